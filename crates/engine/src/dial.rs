//! Connections to ports of machines: one function, whichever way they take.

use std::net::Ipv4Addr;

use hutch_guest::Kind;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpStream;
use tokio::time::timeout;
use tokio_util::either::Either;

use crate::access::{self, Access};
use crate::exec::ready;
use crate::{Engine, Error, Principal, deadline, engine};

impl Engine {
    /// Connects to TCP port `port` of a machine; waits for a machine that is starting. `shutdown` ends our direction
    /// alone; a stream that is dropped is broken off.
    ///
    /// It goes straight to the machine's address where the host routes for it, and through its agent otherwise: what
    /// listens on the machine's loopback only, or behind a firewall of its own, is reached by the second.
    ///
    /// # Errors
    /// [`Error::NothingListens`]; that the machine does not run; what its guest says of the port.
    pub async fn dial(
        &self,
        who: &Principal,
        reference: &str,
        port: u16,
    ) -> Result<impl AsyncRead + AsyncWrite + Send + Unpin + use<>, Error> {
        access::check(who, Access::Write)?;
        if port == 0 {
            return Err(Error::invalid("port", "is 0; ports are 1 to 65535"));
        }
        let machine = self.find_machine(who, reference)?;
        let session = ready(&machine, "take connections").await?;
        if let Some(address) = self.address(&machine)
            && let Some(stream) = straight(address, port).await
        {
            return Ok(session.with(Either::Left(stream)));
        }
        let through = session
            .dial("", port)
            .await
            .map_err(|error| match error.kind() {
                Kind::NothingListens => Error::NothingListens {
                    name: machine.name(),
                    port,
                },
                _ => error.into(),
            })?;
        Ok(session.with(Either::Right(through)))
    }

    fn address(&self, machine: &engine::Machine) -> Option<Ipv4Addr> {
        let current = machine.cell.get()?;
        let runtime = self.shared.runtimes.get(&current.record.runtime)?;
        self.shared
            .network()
            .address(&current.record, runtime.as_ref())
    }
}

/// A connection past the agent, where there is one to be had.
async fn straight(address: Ipv4Addr, port: u16) -> Option<TcpStream> {
    let connecting = TcpStream::connect((address, port));
    let stream = timeout(deadline::DIAL_STRAIGHT, connecting)
        .await
        .ok()?
        .ok()?;
    // Small answers must not wait for the acknowledgement of the one before.
    stream.set_nodelay(true).ok()?;
    Some(stream)
}
