//! Connections to ports of machines: one function, whichever way they take.

use hutch_guest::Kind;
use tokio::io::{AsyncRead, AsyncWrite};

use crate::access::{self, Access};
use crate::exec::ready;
use crate::{Engine, Error, Principal};

impl Engine {
    /// Connects to TCP port `port` of a machine, as a program inside it would by the loopback; waits for a machine that
    /// is starting. `shutdown` ends our direction alone; a stream that is dropped is broken off.
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
        session
            .dial("", port)
            .await
            .map_err(|error| match error.kind() {
                Kind::NothingListens => Error::NothingListens {
                    name: machine.name(),
                    port,
                },
                _ => error.into(),
            })
    }
}
