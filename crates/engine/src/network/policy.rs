//! What a machine's policy means to the firewall. Pure.

use std::collections::BTreeSet;

use hutch_contract::id::{MachineId, OwnerId};
use hutch_contract::name::Name;
use hutch_contract::network::{Egress, MAX_GROUPS, MAX_RULES, NetworkPolicy};
use hutch_contract::record::MachineRecord;
use hutch_net::cidr::Cidr;
use hutch_net::domain::{Domains, Pattern};
use hutch_net::elements::{self, Limits, Peer, Policy};

use super::names::Members;
use crate::Error;

/// A machine that has a network, as its record says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Member {
    pub id: MachineId,
    pub owner: OwnerId,
    pub name: Name,
    pub policy: NetworkPolicy,
}

impl Member {
    pub fn of(record: &MachineRecord) -> Member {
        Member {
            id: record.id.clone(),
            owner: record.owner.clone(),
            name: record.name.clone(),
            policy: record.network.clone(),
        }
    }

    /// Whether the two may talk to each other.
    pub fn shares_a_group(&self, other: &Member) -> bool {
        self.owner == other.owner
            && self
                .policy
                .groups
                .iter()
                .any(|group| other.policy.groups.contains(group))
    }
}

/// What is allowed or denied: ranges, and domains.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Rules {
    pub ranges: Vec<Cidr>,
    pub domains: Vec<Pattern>,
}

impl Rules {
    /// Reads a list of a policy.
    pub fn parse(field: &'static str, texts: &[String]) -> Result<Rules, Error> {
        let mut rules = Rules::default();
        for text in texts {
            if let Ok(range) = text.parse::<Cidr>() {
                rules.ranges.push(range);
            } else if let Ok(domain) = text.parse::<Pattern>() {
                rules.domains.push(domain);
            } else {
                let shown: String = text.chars().take(64).collect();
                return Err(Error::invalid(
                    field,
                    format!(
                        "has `{}`, which is neither a range of addresses such as 10.1.0.0/16 nor a domain such \
                         as example.com or *.example.com",
                        shown.escape_debug()
                    ),
                ));
            }
        }
        Ok(rules)
    }
}

/// Refuses a policy that has no meaning.
pub(crate) fn check(policy: &NetworkPolicy) -> Result<(), Error> {
    for (field, list) in [
        ("network.allow", &policy.allow),
        ("network.deny", &policy.deny),
    ] {
        if list.len() > MAX_RULES {
            return Err(Error::invalid(
                field,
                format!(
                    "has {} entries, and at most {MAX_RULES} are possible",
                    list.len()
                ),
            ));
        }
        Rules::parse(field, list)?;
    }
    if policy.groups.len() > MAX_GROUPS {
        return Err(Error::invalid(
            "network.groups",
            format!(
                "has {} entries, and at most {MAX_GROUPS} are possible",
                policy.groups.len()
            ),
        ));
    }
    Ok(())
}

/// The machines of the firewall that these members are, each by its label.
pub(crate) fn machines(
    members: &Members,
    labels: impl IntoIterator<Item = String>,
    limits: Limits,
) -> Vec<elements::Machine> {
    let wanted: BTreeSet<String> = labels.into_iter().collect();
    let mut all = Vec::new();
    for label in &wanted {
        let Some((machine, member)) = members.get(label) else {
            continue;
        };
        let others = members
            .iter()
            .filter(|(other, (_, its))| *other != label && its.shares_a_group(member));
        let peers = others.map(|(_, (other, _))| Peer {
            ipv4: other.ipv4,
            ipv6: other.ipv6,
        });
        all.push(elements::Machine {
            policy: Policy {
                peers: peers.collect(),
                ..rules(&member.policy)
            },
            limits,
            ..machine.clone()
        });
    }
    all
}

/// A policy without peers. It was checked when it was recorded: what cannot be read any more denies everything.
fn rules(policy: &NetworkPolicy) -> Policy {
    let lists = Rules::parse("allow", &policy.allow).and_then(|allow| {
        let deny = Rules::parse("deny", &policy.deny)?;
        Ok((allow, deny))
    });
    let Ok((allow, deny)) = lists else {
        return Policy {
            egress: elements::Egress::None,
            ..Policy::default()
        };
    };
    Policy {
        egress: match policy.egress {
            Egress::Open => elements::Egress::Open,
            Egress::Public => elements::Egress::Public,
            Egress::None => elements::Egress::None,
        },
        allow: allow.ranges,
        deny: deny.ranges,
        domains: Domains {
            allow: allow.domains,
            deny: deny.domains,
        },
        ..Policy::default()
    }
}
