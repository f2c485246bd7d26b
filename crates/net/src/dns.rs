//! The resolver of machines: it answers at the gateway's address, where the firewall sends their questions
//! ([`crate::rules::Rules::dns_port`]).
//!
//! | question | answer |
//! | --- | --- |
//! | `NAME.hutch.internal`, addresses of private networks | ours ([`Directory`]), never forwarded; whatever the policy |
//! | a name that [`Policy::judge`] denies, and without egress every name that is not allowed | `REFUSED`; nobody is asked, since a question can carry data out |
//! | HTTPS and SVCB, with rules about names | none: they carry addresses that nobody would record |
//! | all else | the host's resolver's; of it, only what belongs to the question, without addresses that the policy does not believe ([`Policy::believes`]) |
//!
//! Addresses are recorded in the firewall before the machine is told them, for the time that the answer is good for.
//! Deciding by name is as good as addresses are: hosts that share one cannot be told apart, and a denied name whose
//! address a machine knows from elsewhere is only closed when the machine had learned it here before.

mod load;
mod message;
mod resolv;
mod route;
mod server;
mod upstream;

use std::error::Error;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use crate::domain::{Domain, Judgement};
use crate::elements::Policy;

pub use load::Limits;
pub use resolv::Upstreams;
pub use server::{Config, Server};

/// The zone of machines' own names.
pub const ZONE: &str = "hutch.internal";

/// Who asks.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Asker {
    /// The machine's label, which the firewall knows it by.
    pub label: String,
    /// Its policy as it is now.
    pub policy: Policy,
}

/// Why an answer could not be recorded.
pub type NotRecorded = Box<dyn Error + Send + Sync>;

/// What the resolver must know, and have done, about machines. All but [`Directory::record`] is asked for every
/// question, and must be quick.
pub trait Directory: Send + Sync + 'static {
    /// The machine that has this address. The firewall has seen to it that nobody else sends from it.
    fn asker(&self, address: IpAddr) -> Option<Arc<Asker>>;

    /// Addresses of `NAME.hutch.internal` as that machine may see it; `name` is in lower case, and may have dots. None
    /// when there is no such name for it.
    fn addresses(&self, asker: &Asker, name: &str) -> Option<Vec<IpAddr>>;

    /// The name of an address, without [`ZONE`], as that machine may see it.
    fn name(&self, asker: &Asker, address: IpAddr) -> Option<String>;

    /// Puts the addresses that a name led that machine to into the firewall for so long, and returns when the kernel
    /// has them; with what the policy says of the name by then. [`crate::firewall::Firewall::learn`] does it.
    ///
    /// # Errors
    /// They are not in the firewall. The machine gets no answer then.
    fn record(
        &self,
        asker: &Asker,
        name: &Domain,
        addresses: Vec<IpAddr>,
        lifetime: Duration,
    ) -> impl Future<Output = Result<Judgement, NotRecorded>> + Send;
}
