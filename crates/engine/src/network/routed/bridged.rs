//! The bridge that machines are on, kept by the kernel's word: it may be somebody else's, who changes it.

use std::sync::atomic::Ordering;

use hutch_net::bridge::Verified;
use tracing::{error, info, warn};

use super::{Inner, LOOK_AGAIN, Routed};
use crate::Error;

impl Routed {
    /// Takes the bridge as it is whenever it changes, until [`Routed::end`]. Blocks.
    pub fn keep_bridge(&self) {
        let events = match &self.inner().bridge {
            Some(bridge) => bridge.events(),
            None => return,
        };
        let mut events = match events {
            Ok(events) => events,
            Err(error) => {
                error!(error = %Error::from(error).chain(), "changes of the bridge are not told");
                return;
            }
        };
        // It may have changed before we listened.
        let mut changed = true;
        let mut unfit: Option<String> = None;
        while !self.ended.load(Ordering::Acquire) {
            if changed {
                self.look_at_bridge(&mut unfit);
            }
            changed = match events.wait(LOOK_AGAIN) {
                // What could not be done before may go now.
                Ok(changed) => changed || unfit.is_some(),
                Err(error) => {
                    warn!(%error, "changes of the bridge are not told");
                    std::thread::sleep(LOOK_AGAIN);
                    true
                }
            };
        }
    }

    /// Looks at it once; `unfit` is what was wrong with it the last time.
    fn look_at_bridge(&self, unfit: &mut Option<String>) {
        let mut inner = self.inner();
        if self.ended.load(Ordering::Acquire) {
            return;
        }
        match self.follow(&mut inner) {
            Ok(Some(Verified::Changed)) => {
                info!("the bridge of machines has changed: they are on it as it is now");
            }
            Ok(_) if unfit.is_some() => info!("the bridge of machines is as it must be again"),
            Ok(_) => {}
            Err(error) => {
                let said = error.chain();
                if unfit.as_ref() != Some(&said) {
                    error!(
                        error = said,
                        hint = error.hint(),
                        "machines have no network until their bridge is as it must be"
                    );
                }
                *unfit = Some(said);
                return;
            }
        }
        *unfit = None;
    }

    fn follow(&self, inner: &mut Inner) -> Result<Option<Verified>, Error> {
        let Inner {
            bridge: Some(bridge),
            firewall,
            mtu,
            ..
        } = inner
        else {
            return Ok(None);
        };
        let machines: Vec<_> = firewall.machines().values().cloned().collect();
        let verified = bridge.verify(&machines)?;
        firewall.relink(bridge.link())?;
        *mtu = bridge.mtu();
        Ok(Some(verified))
    }
}
