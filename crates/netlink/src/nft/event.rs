//! News about who changed what.

use std::os::fd::{AsFd, BorrowedFd};
use std::time::Duration;

use super::{NEW_GENERATION, SUBSYSTEM, TABLE};
use crate::attribute::{find, text};
use crate::{Error, Protocol, Result, Socket};

/// `NFNLGRP_NFTABLES` is group 7.
const GROUP: u32 = 1 << 6;

/// Hears of every change to nf_tables in this network namespace.
#[derive(Debug)]
pub struct Events {
    socket: Socket,
    table: String,
    own: u32,
}

impl Events {
    /// Listens for changes to tables of this name, of any family, that the socket with port `own` did not make.
    ///
    /// # Errors
    /// As [`Socket::listening`].
    pub fn listen(table: &str, own: u32) -> Result<Self> {
        Ok(Self {
            socket: Socket::listening(Protocol::Netfilter, GROUP)?,
            table: table.to_owned(),
            own,
        })
    }

    /// Waits until somebody else changed the tables; false when nobody did within `patience`, give or take.
    ///
    /// News that were lost count as a change.
    ///
    /// # Errors
    /// The socket failed.
    pub fn wait(&mut self, patience: Duration) -> Result<bool> {
        if !self.socket.wait(patience)? {
            return Ok(false);
        }
        let (mut touched, own, table) = (false, self.own, &self.table);
        let all = self.socket.drain(|news| {
            let ours = news.kind & 0xff00 == SUBSYSTEM && news.kind != NEW_GENERATION;
            if !ours || news.port == own {
                return;
            }
            let name = news.body.get(4..).and_then(|rest| find(rest, TABLE));
            touched |= name.is_some_and(|name| text(name) == *table);
        });
        match all {
            Ok(()) => Ok(touched),
            Err(Error::Lost) => Ok(true),
            Err(error) => Err(error),
        }
    }
}

impl AsFd for Events {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}
