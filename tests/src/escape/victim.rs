//! A process of the user's on the host that has one of everything, and minds nothing. It ends with its standard input.

use std::fs::File;
use std::io::{self, Read, Write};
use std::net::{TcpListener, UdpSocket};
use std::os::fd::AsRawFd;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixListener};

use casemate_tests::escapes::{SECRET, Victim};
use rustix::pty::{OpenptFlags, openpt, ptsname, unlockpt};

use crate::attempt::{c, own};
use crate::{call, sockets};

const OURS: i32 = 0o600 | libc::IPC_CREAT;

fn remove(victim: &Victim, identifiers: [i64; 3]) -> io::Result<()> {
    std::fs::remove_file(format!("/dev/shm/{}", victim.shared_memory))?;
    call!(libc::SYS_mq_unlink, c(&victim.queue).as_c_str())?;
    call!(libc::SYS_shmctl, identifiers[0], libc::IPC_RMID, 0)?;
    call!(libc::SYS_msgctl, identifiers[1], libc::IPC_RMID, 0)?;
    call!(libc::SYS_semctl, identifiers[2], 0, libc::IPC_RMID, 0)?;
    Ok(())
}

pub fn be() -> io::Result<()> {
    // Where Yama is: whoever asks may trace this one.
    let _ = call!(libc::SYS_prctl, libc::PR_SET_PTRACER, u64::MAX, 0, 0, 0);
    let pid = std::process::id().cast_signed();
    let secret: &'static [u8] = Box::leak(Box::new(*SECRET));
    let file = File::open("/proc/self/exe")?;
    let terminal = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC)?;
    unlockpt(&terminal)?;
    let tcp = TcpListener::bind("127.0.0.1:0")?;
    let udp = UdpSocket::bind("127.0.0.1:0")?;
    let name = format!("casemate-escape-{pid}");
    let socket = UnixListener::bind_addr(&SocketAddr::from_abstract_name(&name)?)?;
    let keys = [1, 2, 3].map(|kind| pid * 16 + kind);
    let victim = Victim {
        pid,
        address: secret.as_ptr() as u64,
        descriptor: file.as_raw_fd(),
        terminal: ptsname(&terminal, Vec::new())?.into_string().map_err(io::Error::other)?,
        shared_memory: name.clone(),
        queue: name.clone(),
        keys,
        tcp: tcp.local_addr()?.port(),
        udp: udp.local_addr()?.port(),
        abstract_socket: name,
    };
    File::create(format!("/dev/shm/{}", victim.shared_memory))?;
    let queue = c(&victim.queue);
    let flags = libc::O_CREAT | libc::O_RDWR | libc::O_CLOEXEC;
    call!(libc::SYS_mq_open, queue.as_c_str(), flags, 0o600, 0).map(own)?;
    let identifiers = [
        call!(libc::SYS_shmget, keys[0], 4096, OURS)?,
        call!(libc::SYS_msgget, keys[1], OURS)?,
        call!(libc::SYS_semget, keys[2], 1, OURS)?,
    ];
    std::thread::spawn(move || tcp.incoming().flatten().for_each(sockets::greet));
    std::thread::spawn(move || {
        let mut bytes = [0; 16];
        while let Ok((size, from)) = udp.recv_from(&mut bytes) {
            // Who does not listen to the answer had none.
            let _ = udp.send_to(&bytes[..size], from);
        }
    });
    std::thread::spawn(move || socket.incoming().for_each(drop));
    println!("{}", serde_json::to_string(&victim)?);
    io::stdout().flush()?;
    io::stdin().read_to_end(&mut Vec::new())?;
    remove(&victim, identifiers)
}
