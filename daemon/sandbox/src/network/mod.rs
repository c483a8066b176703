//! A private network. Beside init, in the host's network namespace, live the [`keeper`], its child pasta(1), which carries
//! the traffic, and its child the [`relay`], which carries questions to the host's name servers.
//!
//! All three are root of the outer namespace, so no ids of the user's, and end when init ends ([`crate::keeper`]).

mod gate;
mod keeper;
mod pasta;
mod relay;
mod resolver;
mod routes;
mod sets;

use std::fs::File;
use std::net::{TcpListener, UdpSocket};
use std::os::fd::AsFd;

use casemate_sandbox::plan::{NAME_SERVER, Private};

use crate::keeper::{Keeper, Launcher};
use crate::mounts::step;
use crate::{InitError, sys};

pub struct Connection(Keeper);

pub fn begin(private: &Private, launcher: &Launcher<'_>) -> Result<Connection, InitError> {
    Keeper::begin(launcher, &[], |socket| keeper::keep(socket, private)).map(Connection)
}

impl Connection {
    /// Hand the namespace that the launcher has just made to the keeper.
    pub fn attach(&self, private: &Private) -> Result<(), InitError> {
        let sets = match &private.allow {
            None => None,
            Some(allow) => {
                sets::write(allow)?;
                Some(sets::open()?)
            }
        };
        step("bring loopback up", sys::loopback_up())?;
        let namespace = step("hold the network namespace", File::open("/proc/self/ns/net"))?;
        let address = (NAME_SERVER, 53);
        let udp = step("bind the name server", UdpSocket::bind(address))?;
        let tcp = step("bind the name server", TcpListener::bind(address))?;
        let mut descriptors = vec![namespace.as_fd(), udp.as_fd(), tcp.as_fd()];
        descriptors.extend(sets.as_ref().map(AsFd::as_fd));
        self.0.hand_over("the network namespace", &descriptors)
    }

    /// Until the keeper has connected the namespace.
    pub fn ready(&self) -> Result<(), InitError> {
        self.0.ready(InitError::Network).map(drop)
    }

    /// Take the network down and see it gone.
    pub fn end(self) -> Result<(), InitError> {
        self.0.end()
    }
}
