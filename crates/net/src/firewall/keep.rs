//! Looking whether the tables are as they should be, and making them so.

use std::collections::BTreeSet;

use hutch_netlink::nft::{Batch, Family, OWNER, PERSIST, RuleFound, Table};
use rustix::io::Errno;

use super::{Config, Error, Firewall, Result, Verified, wanted};
use crate::elements::{Elements, difference};
use crate::rules::{Link, TableRules};

/// Transactions that come too late before we give up.
const ATTEMPTS: usize = 20;
/// Bytes of the instance's name that fit into a comment beside the version.
const INSTANCE_MAX: usize = 64;

pub(super) const FAMILIES: [Family; 3] = [Family::Inet, Family::Arp, Family::Bridge];

/// What must hold of a table for its elements to be worth keeping.
#[derive(Debug, PartialEq, Eq)]
enum Found {
    Nothing,
    /// A table of ours, but of another version, or mutilated.
    Other,
    /// All sets and chains are there.
    Whole,
}

pub(super) fn flags(own: bool) -> u32 {
    if own { OWNER | PERSIST } else { 0 }
}

/// Whose tables these are, and the version of their rules: a hash of all that is made, by FNV-1a, but for a bridge's MAC.
pub(super) fn comment(config: &Config) -> String {
    let mut batch = Batch::default();
    let mut rules = config.rules.clone();
    if let Link::Bridge { mac, .. } = &mut rules.link {
        *mac = [0; 6];
    }
    for table in rules.tables() {
        table.make(&mut batch, 0, "");
    }
    let bytes = batch.bytes().unwrap_or_default();
    let version = bytes.iter().fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| {
        (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3)
    });
    let mut instance = config.instance.clone();
    while instance.len() > INSTANCE_MAX {
        instance.pop();
    }
    format!("hutch {instance} rules {version:016x}")
}

impl Firewall {
    /// Looks whether rules and elements are as they should be, and makes good what is not, in one transaction.
    ///
    /// It costs one question to the kernel when nobody changed anything since the last time.
    ///
    /// # Errors
    /// The kernel refuses.
    pub fn verify(&mut self) -> Result<Verified> {
        let generation = self.generation()?;
        if self.sound == Some(generation) {
            return Ok(Verified::Sound);
        }
        if self.is_sound()? && self.generation()? == generation {
            self.sound = Some(generation);
            return Ok(Verified::Sound);
        }
        self.rebuild()?;
        Ok(Verified::Repaired)
    }

    /// Lets machines speak to a bridge whose MAC has changed. Nothing else may differ from the link that there was.
    ///
    /// # Errors
    /// The kernel refuses; the next [`Firewall::verify`] tries again.
    pub fn relink(&mut self, link: Link) -> Result<()> {
        if self.config.rules.link == link {
            return Ok(());
        }
        self.config.rules.link = link;
        self.rebuild()
    }

    /// After one transaction of ours: all is still sound if it was, and nobody else changed anything.
    pub(super) fn changed_once(&mut self) -> Result<()> {
        if let Some(before) = self.sound {
            let now = self.generation()?;
            self.sound = (now == before.wrapping_add(1)).then_some(now);
        }
        Ok(())
    }

    /// Makes everything as it should be, whatever is there.
    pub(super) fn rebuild(&mut self) -> Result<()> {
        self.sound = None;
        for _ in 0..ATTEMPTS {
            let generation = self.generation()?;
            let batch = self.repair()?;
            match self.nft.commit(&batch, Some(generation)) {
                Ok(()) => {}
                Err(error) => match error.errno() {
                    // Somebody was faster.
                    Some(Errno::RESTART | Errno::AGAIN | Errno::INTR) => continue,
                    // An element has just gone by itself.
                    Some(Errno::NOENT) => continue,
                    Some(Errno::OPNOTSUPP | Errno::INVAL) if self.flags != 0 => {
                        self.flags = 0;
                        continue;
                    }
                    Some(Errno::PERM) => {
                        let table = self.config.rules.table();
                        return Err(Error::Owned { table });
                    }
                    _ => return Err(self.failed(error)),
                },
            }
            let rules = self.dump_rules()?;
            if self.generation()? == generation.wrapping_add(1) {
                self.rules = rules;
                self.sound = Some(generation.wrapping_add(1));
                return Ok(());
            }
        }
        let table = self.config.rules.table();
        Err(Error::Restless { table })
    }

    /// What must be done to what is there now.
    fn repair(&mut self) -> Result<Batch> {
        let tables = self.config.rules.tables();
        let mut batch = Batch::default();
        for table in self.leftover()? {
            batch.delete_table(&table);
        }
        let mut whole = true;
        let mut found = Vec::new();
        for table in &tables {
            let there = self.look(table)?;
            whole &= there == Found::Whole;
            found.push(there);
        }
        if whole {
            let (gone, new) = self.drift()?;
            for table in &tables {
                table.renew(&mut batch, self.flags, &self.comment);
            }
            self.delete(&mut batch, &gone);
            self.insert(&mut batch, &new);
            return Ok(batch);
        }
        for (table, there) in tables.iter().zip(found) {
            if there != Found::Nothing {
                batch.delete_table(&table.table);
            }
            table.make(&mut batch, self.flags, &self.comment);
        }
        for machine in self.machines.values() {
            let elements = self.config.elements(machine);
            self.insert(&mut batch, &elements);
        }
        self.insert(&mut batch, &self.learned_elements());
        // Counters begin anew.
        self.base = self.last.clone();
        Ok(batch)
    }

    fn look(&mut self, rules: &TableRules) -> Result<Found> {
        let table = &rules.table;
        let failed = |source| Error::Kernel {
            table: table.name.clone(),
            source,
        };
        let Some(there) = self.nft.table(table).map_err(failed)? else {
            return Ok(Found::Nothing);
        };
        let sets: BTreeSet<_> = self.nft.sets(table).map_err(failed)?.into_iter().collect();
        let chains: BTreeSet<_> = self
            .nft
            .chains(table)
            .map_err(failed)?
            .into_iter()
            .collect();
        // Without its owner, a table has lost the flag, too.
        let orphan = self.flags & !OWNER;
        let same = there.comment == self.comment
            && (there.flags == self.flags || there.flags == orphan)
            && sets == rules.sets.iter().map(|(set, _)| set.name.clone()).collect()
            && chains == rules.chains.iter().map(|chain| chain.name.into()).collect();
        Ok(if same { Found::Whole } else { Found::Other })
    }

    fn is_sound(&mut self) -> Result<bool> {
        if !self.leftover()?.is_empty() {
            return Ok(false);
        }
        for table in &self.config.rules.tables() {
            if self.look(table)? != Found::Whole {
                return Ok(false);
            }
        }
        let (gone, new) = self.drift()?;
        Ok(gone.is_empty() && new.is_empty() && self.dump_rules()? == self.rules)
    }

    /// Elements that are there and should not be, and the other way round.
    fn drift(&mut self) -> Result<(Elements, Elements)> {
        let (mut there, mut wanted_here) = (Elements::new(), Elements::new());
        let timed = |set: &str| set.starts_with("names") || set.starts_with("noname");
        for (place, elements) in wanted(&self.config, self.machines.values()) {
            let (family, set) = &place;
            if timed(set) {
                continue;
            }
            let found = self.nft.elements(&self.table(*family), set);
            let found = found.map_err(|source| self.failed(source))?;
            there.insert(
                place.clone(),
                found.into_iter().map(|found| found.element).collect(),
            );
            wanted_here.insert(place, elements);
        }
        let (mut gone, mut add) = difference(&there, &wanted_here);
        let learned = self.learned_drift()?;
        gone.extend(learned.gone);
        add.extend(learned.new);
        Ok((gone, add))
    }

    fn dump_rules(&mut self) -> Result<Vec<RuleFound>> {
        let mut all = Vec::new();
        for family in FAMILIES {
            let table = self.table(family);
            let found = self.nft.rules(&table);
            all.extend(found.map_err(|source| self.failed(source))?);
        }
        Ok(all)
    }

    /// Tables of our name that these rules do not have: of machines that were on a bridge before.
    fn leftover(&mut self) -> Result<Vec<Table>> {
        let tables = self.config.rules.tables();
        let unused = |family: &Family| tables.iter().all(|table| table.table.family != *family);
        let mut all = Vec::new();
        for family in FAMILIES.into_iter().filter(unused) {
            let table = self.table(family);
            let found = self.nft.table(&table);
            if found.map_err(|source| self.failed(source))?.is_some() {
                all.push(table);
            }
        }
        Ok(all)
    }

    fn generation(&mut self) -> Result<u32> {
        self.nft.generation().map_err(|source| self.failed(source))
    }
}
