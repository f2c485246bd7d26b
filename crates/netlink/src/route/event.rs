//! News about one link.

use std::os::fd::{AsFd, BorrowedFd};
use std::time::Duration;

use super::{
    IFLA_IFNAME, LINK_EVENTS, RTM_DELADDR, RTM_DELLINK, RTM_NEWADDR, RTM_NEWLINK, link, ne32,
};
use crate::attribute::{find, text};
use crate::message::Received;
use crate::{Error, Protocol, Result, Socket};

/// `RTMGRP_IPV4_IFADDR` and `RTMGRP_IPV6_IFADDR`.
const ADDRESS_EVENTS: u32 = 0x10 | 0x100;

/// Hears of every change to a link of one name, and to its addresses, whoever makes it.
#[derive(Debug)]
pub struct Events {
    socket: Socket,
    name: String,
    index: Option<u32>,
}

impl Events {
    /// Listens for changes to the link of this name, which need not be there yet.
    ///
    /// # Errors
    /// As [`Socket::listening`].
    pub fn listen(name: &str) -> Result<Self> {
        let mut asking = Socket::open(Protocol::Route)?;
        // Listening before looking: what comes in between is in the queue.
        let socket = Socket::listening(Protocol::Route, LINK_EVENTS | ADDRESS_EVENTS)?;
        let found = link(&mut asking, name)?;
        Ok(Self {
            socket,
            name: name.to_owned(),
            index: found.map(|link| link.index),
        })
    }

    /// Waits until it changed; false when it did not within `patience`, or when what changed is another one.
    ///
    /// News that were lost count as a change.
    ///
    /// # Errors
    /// The socket failed.
    pub fn wait(&mut self, patience: Duration) -> Result<bool> {
        if !self.socket.wait(patience)? {
            return Ok(false);
        }
        let (mut touched, name, index) = (false, &self.name, &mut self.index);
        let all = self.socket.drain(|news| {
            touched |= concerns(news, name, index).unwrap_or(false);
        });
        match all {
            Ok(()) => Ok(touched),
            Err(Error::Lost) => {
                let found = link(&mut Socket::open(Protocol::Route)?, &self.name)?;
                self.index = found.map(|link| link.index).or(self.index);
                Ok(true)
            }
            Err(error) => Err(error),
        }
    }
}

/// Whether news are about the link of that name, which had the number `index`.
fn concerns(news: &Received<'_>, name: &str, index: &mut Option<u32>) -> Option<bool> {
    let number = ne32(news.body.get(4..8)?)?;
    match news.kind {
        RTM_NEWADDR | RTM_DELADDR => Some(*index == Some(number)),
        RTM_NEWLINK | RTM_DELLINK => {
            let named = find(news.body.get(16..)?, IFLA_IFNAME).map(text);
            if named.as_deref() == Some(name) {
                *index = Some(number);
                return Some(true);
            }
            // It has been given another name.
            Some(*index == Some(number))
        }
        _ => None,
    }
}

impl AsFd for Events {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}
