//! `[runtime.resource_limits]`: what an environment may use of the machine. The same names serve the manifest, policy's
//! bounds, the bus and the client.

use std::fmt;

use serde::de::Error as _;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// Where a limit is missing, nothing is asked for.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ResourceLimits {
    /// MiB; what is beyond is taken from swap, and then a process inside is killed.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub memory_limit_mb: Option<u64>,
    /// MiB of swap beside the memory; as much as memory where it is missing, 0 for none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub swap_limit_mb: Option<u64>,
    /// 1,024 is the share of one who asks for nothing.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cpu_shares: Option<u64>,
    /// Processors' worth of time: 1.5 is one and a half.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cpus: Option<Cpus>,
    /// Processes and threads.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub pids: Option<u64>,
    /// 1 to 10,000; 100 is the weight of one who asks for nothing.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub io_weight: Option<u64>,
}

/// A limit outside what makes sense.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{key} = {value} {rule}")]
pub struct BadLimit {
    pub key: &'static str,
    pub value: String,
    pub rule: &'static str,
}

impl ResourceLimits {
    /// All names, in the order in which they are shown.
    pub const KEYS: [&str; 6] =
        ["memory_limit_mb", "swap_limit_mb", "cpu_shares", "cpus", "pids", "io_weight"];

    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }

    /// The names of those that are asked for.
    pub fn keys(&self) -> impl Iterator<Item = &'static str> + use<> {
        let asked = [
            self.memory_limit_mb.is_some(),
            self.swap_limit_mb.is_some(),
            self.cpu_shares.is_some(),
            self.cpus.is_some(),
            self.pids.is_some(),
            self.io_weight.is_some(),
        ];
        Self::KEYS.into_iter().zip(asked).filter(|(_, asked)| *asked).map(|(key, _)| key)
    }

    /// Less than this, and an environment could not even start; more than this, and the kernel has no word for it.
    pub fn check(&self) -> Result<(), BadLimit> {
        for (key, value, least, most, rule) in [
            (
                "memory_limit_mb",
                self.memory_limit_mb,
                16,
                1 << 34,
                "is no memory for an environment; give 16 or more",
            ),
            ("swap_limit_mb", self.swap_limit_mb, 0, 1 << 34, "is too much"),
            ("cpu_shares", self.cpu_shares, 2, 262_144, "is no share; give 2 to 262144"),
            ("pids", self.pids, 8, 4_194_304, "is no number of processes; give 8 to 4194304"),
            ("io_weight", self.io_weight, 1, 10_000, "is no weight; give 1 to 10000"),
        ] {
            if let Some(value) = value.filter(|value| !(least..=most).contains(value)) {
                return Err(BadLimit { key, value: value.to_string(), rule });
            }
        }
        match self.cpus {
            Some(cpus) if !(10..=10_000_000).contains(&cpus.thousandths()) => Err(BadLimit {
                key: "cpus",
                value: cpus.to_string(),
                rule: "is no number of processors; give 0.01 or more",
            }),
            _ => Ok(()),
        }
    }

    /// Bytes of memory and, beside it, of swap.
    pub fn memory(&self) -> (Option<u64>, Option<u64>) {
        let bytes = |mib: u64| mib << 20;
        (self.memory_limit_mb.map(bytes), self.swap_limit_mb.or(self.memory_limit_mb).map(bytes))
    }

    /// cgroup v2's weight of the shares, as systemd converts them: 1,024 is 100.
    pub fn cpu_weight(&self) -> Option<u64> {
        self.cpu_shares.map(|shares| (shares * 100 / 1_024).clamp(1, 10_000))
    }
}

/// A number of processors, in thousandths: exact, and so comparable.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Cpus(u64);

impl Cpus {
    pub const fn from_thousandths(thousandths: u64) -> Self {
        Self(thousandths)
    }

    pub const fn thousandths(self) -> u64 {
        self.0
    }

    /// `None` for what is no number of processors, such as a negative one.
    pub fn from_number(number: f64) -> Option<Self> {
        let thousandths = (number * 1_000.0).round();
        // Below 2⁵³ a float holds every whole number.
        #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)]
        (0.0..=1e12).contains(&thousandths).then_some(Self(thousandths as u64))
    }

    pub fn number(self) -> f64 {
        #[allow(clippy::cast_precision_loss)]
        let thousandths = self.0 as f64;
        thousandths / 1_000.0
    }
}

impl fmt::Display for Cpus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.number().fmt(f)
    }
}

impl Serialize for Cpus {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_f64(self.number())
    }
}

impl<'de> Deserialize<'de> for Cpus {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let number = f64::deserialize(deserializer)?;
        Self::from_number(number)
            .ok_or_else(|| D::Error::custom(format!("{number} is no number of processors")))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_of_them_come_back_as_they_were() {
        let text = "memory_limit_mb = 64\nswap_limit_mb = 0\ncpu_shares = 512\ncpus = 1.5\npids = 100\nio_weight = 50\n";
        let limits: ResourceLimits = toml::from_str(text).expect("good");
        assert_eq!(limits.check(), Ok(()));
        assert_eq!(limits.memory(), (Some(64 << 20), Some(0)));
        assert_eq!(limits.cpu_weight(), Some(50));
        assert_eq!(toml::to_string(&limits).expect("written"), text);
        let keys: Vec<&str> =
            text.lines().filter_map(|line| line.split_once(" = ")).map(|(key, _)| key).collect();
        assert_eq!(keys, ResourceLimits::KEYS);
        let whole: ResourceLimits = toml::from_str("cpus = 2\n").expect("good");
        assert_eq!(whole.cpus, Some(Cpus::from_thousandths(2_000)));
    }

    #[test]
    fn swap_is_bounded_with_memory() {
        let limits = ResourceLimits { memory_limit_mb: Some(64), ..ResourceLimits::default() };
        assert_eq!(limits.memory(), (Some(64 << 20), Some(64 << 20)));
    }

    #[test]
    fn nonsense_is_refused() {
        for text in [
            "memory_limit_mb = 1",
            "pids = 2",
            "cpu_shares = 0",
            "io_weight = 0",
            "cpus = 0.0",
            "cpus = 0.001",
        ] {
            let limits: ResourceLimits = toml::from_str(text).expect("well written");
            assert!(limits.check().is_err(), "{text}");
        }
        for text in ["cpus = -1.0", "cpus = nan", "cpus = inf", "pids = -1", "memory = 1"] {
            assert!(toml::from_str::<ResourceLimits>(text).is_err(), "{text}");
        }
    }
}
