#!/usr/bin/python3
"""Casemate from Python, over the session bus: what a desktop program or a script of yours would do.

    casemate.py list
    casemate.py fetch REFERENCE
    casemate.py build NAME [MANIFEST]
    casemate.py exec NAME COMMAND…

Needs dbus-next (Debian: python3-dbus-next). The interfaces are described in interfaces/*.xml.
"""

import asyncio
import os
import sys

from dbus_next import BusType, DBusError, Variant
from dbus_next.aio import MessageBus

NAME = "org.casemate.Casemate1"
ROOT = "/org/casemate/Casemate1"


class Casemate:
    """The daemon; it is started by the bus if it does not run."""

    def __init__(self, bus):
        self.bus = bus

    @classmethod
    async def connect(cls):
        # Without `negotiate_unix_fd` no descriptor can be passed, so neither `build` nor `exec` would work.
        return cls(await MessageBus(bus_type=BusType.SESSION, negotiate_unix_fd=True).connect())

    async def interface(self, path, name):
        node = await self.bus.introspect(NAME, path)
        return self.bus.get_proxy_object(NAME, path, node).get_interface(name)

    async def manager(self):
        return await self.interface(ROOT, f"{NAME}.Manager")

    async def environment(self, selector):
        path = await (await self.manager()).call_get_environment(selector, {})
        return await self.interface(path, f"{NAME}.Environment")

    async def environments(self):
        """The properties of each environment, all in one call."""
        objects = await self.interface(ROOT, "org.freedesktop.DBus.ObjectManager")
        found = (interfaces.get(f"{NAME}.Environment") for interfaces in (await objects.call_get_managed_objects()).values())
        return [{key: value.value for key, value in properties.items()} for properties in found if properties is not None]

    async def follow(self, path):
        """Follow a job to its end; its result. Ctrl-C (or cancelling the task) cancels the job too."""
        job = await self.interface(path, f"{NAME}.Job")
        properties = await self.interface(path, "org.freedesktop.DBus.Properties")
        ended = asyncio.get_running_loop().create_future()

        def end(state):
            if not ended.done():
                ended.set_result(state)

        stage = ""

        def changed(_interface, values, _invalidated):
            nonlocal stage
            if "Stage" in values and values["Stage"].value != stage:
                stage = values["Stage"].value
                print(f"stage: {stage}", file=sys.stderr)

        properties.on_properties_changed(changed)
        job.on_log(lambda line: print(f"log: {line}", file=sys.stderr))
        job.on_ended(end)
        # Listen first, then look: a job that ended in between is not missed.
        state = await job.get_state()
        if state != "running":
            end(state)
        try:
            state = await asyncio.shield(ended)
        except asyncio.CancelledError:
            await job.call_cancel({})
            state = await ended
        if state != "done":
            error, text = await job.get_error()
            raise SystemExit(f"{state}: {text} ({error})")
        return await job.get_result()

    async def build(self, name, manifest):
        """Build an environment; relative mounts are those beneath the manifest's directory, which goes as a descriptor."""
        with open(manifest, encoding="utf-8") as file:
            text = file.read()
        directory = os.open(os.path.dirname(manifest) or ".", os.O_RDONLY | os.O_DIRECTORY)
        try:
            options = {"offline": Variant("b", False)}
            job = await (await self.manager()).call_build(name, text, directory, options)
        finally:
            os.close(directory)
        return await self.follow(job)

    async def execute(self, selector, command, stdin):
        """Run a command with pipes of our own; its output and its exit status as a shell would tell it."""
        environment = await self.environment(selector)
        output, output_in = os.pipe()
        status, status_in = os.pipe()
        try:
            # The daemon hands these very descriptors to the command: no byte of it passes through the bus.
            _process, pidfd = await environment.call_exec(command, stdin, output_in, sys.stderr.fileno(), status_in, {})
        finally:
            # Ours would keep the pipes open after the command's end.
            os.close(output_in)
            os.close(status_in)
        # Signals would go through this: signal.pidfd_send_signal(pidfd, signal.SIGTERM).
        os.close(pidfd)
        loop = asyncio.get_running_loop()
        printed = await loop.run_in_executor(None, _read, output)
        how, _, number = (await loop.run_in_executor(None, _read, status)).decode().partition(" ")
        if not how:
            raise SystemExit("the environment was stopped before the command ended")
        return printed, int(number) + (128 if how == "signal" else 0)


def _read(descriptor):
    with os.fdopen(descriptor, "rb") as file:
        return file.read()


async def main(arguments):
    casemate = await Casemate.connect()
    match arguments:
        case ["list"]:
            for environment in await casemate.environments():
                print(environment["Name"], environment["State"], environment["Release"])
        case ["fetch", reference]:
            print(await casemate.follow(await (await casemate.manager()).call_fetch_release(reference, {})))
        case ["build", name, *rest] if len(rest) < 2:
            result = await casemate.build(name, *rest or ["casemate.toml"])
            print(name, "built" if result["changed"] == "true" else "is up to date")
        case ["exec", name, *command] if command:
            printed, code = await casemate.execute(name, command, sys.stdin.fileno())
            sys.stdout.buffer.write(printed)
            return code
        case _:
            raise SystemExit(__doc__)
    return 0


if __name__ == "__main__":
    try:
        sys.exit(asyncio.run(main(sys.argv[1:])))
    except DBusError as error:
        sys.exit(f"{error.text} ({error.type})")
