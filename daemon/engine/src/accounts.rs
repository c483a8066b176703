//! What everything takes on the disk, and whose it is. `casemate-tree` measures each inode once, with the trees that it is
//! in; whose those trees are is known from the records.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fs::File;
use std::io::{BufRead, BufReader, Seek};
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::sync::Arc;

use casemate_worker::protocol::TreeRequest;

use crate::api::{Account, Caller, JobId, Usages};
use crate::error::Error;
use crate::jobs::{Job, now};
use crate::records::{EnvironmentRecord, Lower};
use crate::releases::blocking;
use crate::{Engine, Inner};

/// Whom something belongs to: `environment`, `release` or `snapshot`, and its name.
pub(crate) type Owner = (&'static str, String);

impl Engine {
    /// Measure the store; [`Self::usages`] tells what was found.
    pub fn measure(&self, caller: &Caller) -> Result<JobId, Error> {
        let inner = Arc::clone(&self.inner);
        let subject = self.inner.settings.store.display().to_string();
        self.inner.jobs.start(caller, "measure", &subject, vec![], move |job| async move {
            let usages = inner.measured(&job).await?;
            let total: u64 = usages.accounts.iter().map(|one| one.exclusive).sum();
            inner.tables().usages = usages;
            Ok(vec![("bytes".into(), total.to_string())])
        })
    }

    /// What was measured last.
    pub fn usages(&self) -> Usages {
        self.inner.tables().usages.clone()
    }
}

fn allocated(path: &Path) -> Result<u64, Error> {
    Ok(path.symlink_metadata().map_err(Error::io("look up", path))?.blocks() * 512)
}

impl Inner {
    /// Who names each layer and upper.
    pub(crate) fn owners_of_lowers(&self) -> HashMap<Lower, BTreeSet<Owner>> {
        let tables = self.tables();
        let mut owners: HashMap<Lower, BTreeSet<Owner>> = HashMap::new();
        let mut add = |lower, owner: &Owner| {
            owners.entry(lower).or_default().insert(owner.clone());
        };
        for (name, record) in &tables.releases {
            let owner = ("release", name.to_string());
            Lower::layers(&record.layers).into_iter().for_each(|lower| add(lower, &owner));
        }
        let name_of = |id| tables.environments.get(id).map(|environment| environment.record.name.clone());
        let own = |record: &EnvironmentRecord| record.stack().collect::<Vec<_>>();
        for environment in tables.environments.values() {
            let owner = ("environment", environment.record.name.clone());
            own(&environment.record).into_iter().for_each(|lower| add(lower, &owner));
            add(Lower::Upper(environment.record.upper), &owner);
        }
        for (name, record) in &tables.snapshots {
            let environment = name_of(&name.environment).unwrap_or_else(|| name.environment.to_string());
            let owner = ("snapshot", format!("{environment} {}", name.snapshot));
            own(&record.environment).into_iter().for_each(|lower| add(lower, &owner));
        }
        owners
    }

    /// Have `casemate-tree` tell at length, into memory: what it is asked for is no longer than its listings' names.
    pub(crate) async fn told_at_length(&self, job: &Job, request: &TreeRequest) -> Result<File, Error> {
        let memory = rustix::fs::memfd_create("casemate-answer", rustix::fs::MemfdFlags::CLOEXEC)
            .map_err(Error::sys("make", "a file in memory"))?;
        let mut answer = File::from(memory.try_clone().map_err(Error::io("copy", "a file in memory"))?);
        self.workers.tree_to(Some(job), &self.store, request, memory).await?;
        answer.rewind().map_err(Error::io("read", "the answer of casemate-tree"))?;
        Ok(answer)
    }

    pub(crate) async fn measured(self: &Arc<Self>, job: &Job) -> Result<Usages, Error> {
        job.stage("measuring");
        let answer = self.told_at_length(job, &TreeRequest::Tally).await?;
        let engine = Arc::clone(self);
        let accounts = blocking(move || engine.accounts(BufReader::new(answer))).await?;
        Ok(Usages { measured_at: now(), accounts })
    }

    fn accounts(&self, lines: impl BufRead) -> Result<Vec<Account>, Error> {
        let odd = |line: &str| Error::Nonsense {
            worker: "casemate-tree",
            answer: line.chars().take(200).collect(),
        };
        let owners = self.owners_of_lowers();
        let mut trees: HashMap<u32, Lower> = HashMap::new();
        let mut own: BTreeMap<Owner, (u64, u64)> =
            owners.values().flatten().map(|owner| (owner.clone(), (0, 0))).collect();
        let (mut shared, mut reclaimable, mut itself) = (0, 0, 0);
        for line in lines.lines() {
            let line = line.map_err(Error::io("read", "what was measured"))?;
            let words: Vec<&str> = line.split(' ').collect();
            match words[..] {
                ["tree", number, path] => {
                    let number: u32 = number.parse().map_err(|_| odd(&line))?;
                    // `objects` and `staging` are no lowers.
                    trees.extend(path.parse::<Lower>().ok().map(|lower| (number, lower)));
                }
                ["bytes", set, bytes] => {
                    let bytes: u64 = bytes.parse().map_err(|_| odd(&line))?;
                    let numbers = set.split(',').filter(|number| !number.is_empty());
                    let numbers: Vec<u32> =
                        numbers.map(str::parse).collect::<Result<_, _>>().map_err(|_| odd(&line))?;
                    let whose: BTreeSet<&Owner> = numbers
                        .iter()
                        .filter_map(|number| owners.get(trees.get(number)?))
                        .flatten()
                        .collect();
                    match whose.len() {
                        // Directories that hold all of it, and what is just being made.
                        0 if numbers.is_empty() || numbers == [1] => itself += bytes,
                        0 => reclaimable += bytes,
                        1 => whose
                            .into_iter()
                            .for_each(|owner| own.entry(owner.clone()).or_default().0 += bytes),
                        _ => {
                            shared += bytes;
                            whose.into_iter().for_each(|owner| {
                                own.entry(owner.clone()).or_default().1 += bytes;
                            });
                        }
                    }
                }
                _ => return Err(odd(&line)),
            }
        }
        let root = self.store.root();
        itself += allocated(root)?;
        for name in ["version", "lock"] {
            itself += allocated(&root.join(name))?;
        }
        for kind in ["releases", "environments", "snapshots"] {
            let directory = root.join(kind);
            itself += allocated(&directory)?;
            for entry in std::fs::read_dir(&directory).map_err(Error::io("list", &directory))? {
                itself += allocated(&entry.map_err(Error::io("list", &directory))?.path())?;
            }
        }
        let account = |kind: &str, name: String, exclusive, shared| Account {
            kind: kind.to_owned(),
            name,
            exclusive,
            shared,
        };
        let mut accounts: Vec<Account> =
            own.into_iter().map(|((kind, name), (alone, with))| account(kind, name, alone, with)).collect();
        let downloads = self.downloads.list()?.iter().map(|(_, bytes, _)| bytes).sum();
        for (kind, bytes) in
            [("shared", shared), ("reclaimable", reclaimable), ("store", itself), ("downloads", downloads)]
        {
            accounts.push(account(kind, String::new(), bytes, 0));
        }
        Ok(accounts)
    }
}
