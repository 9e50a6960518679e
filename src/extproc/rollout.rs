//! How far Envoy follows our picks: everywhere, for a share of the requests, or nowhere.
//!
//! [`Mode::Shadow`] does all the work of a decision and tells Envoy nothing, so that its own policy picks; what the pick
//! would have been worth is counted when the response names who served. [`Mode::Off`] is the kill switch: the request
//! is left to Envoy unread. The share of a pool that is active is cut by a hash of the request's id, so that a retry of
//! a client, and every replica of ours, decides alike; it grows and shrinks without moving those who were in it.
//!
//! A pool's rollout is one atomic word ([`Switch`]): written when the configuration is read again, read by each request
//! once. It guards no other memory, and a request that reads it a moment late is one of a moment ago.

use std::str::FromStr;
use std::sync::atomic::{AtomicU16, Ordering::Relaxed};

use serde::Serialize;
use xxhash_rust::xxh3::xxh3_64;

/// What is done with the picks of a pool; what is greater is stricter.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Mode {
    /// Envoy is told.
    #[default]
    Active,
    /// They are made and counted, and Envoy is not told.
    Shadow,
    /// None are made.
    Off,
}

impl Mode {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::Active, Self::Shadow, Self::Off];

    /// Name in the configuration and in metrics.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Active => "active",
            Self::Shadow => "shadow",
            Self::Off => "off",
        }
    }
}

impl FromStr for Mode {
    type Err = ();

    fn from_str(text: &str) -> Result<Self, ()> {
        // YAML 1.1 has `off` for `false`, and that is how it arrives here when nobody has quoted it.
        let name = if text == "false" { "off" } else { text };
        Self::ALL.into_iter().find(|mode| mode.as_str() == name).ok_or(())
    }
}

/// A share of the requests, 0 to 100.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(transparent)]
pub struct Percent(u8);

impl Percent {
    /// All of them.
    pub const ALL: Self = Self(100);

    /// The number.
    pub fn get(self) -> u8 {
        self.0
    }
}

impl FromStr for Percent {
    type Err = ();

    fn from_str(text: &str) -> Result<Self, ()> {
        text.parse().ok().filter(|percent| *percent <= 100).map(Self).ok_or(())
    }
}

/// How a pool's picks are followed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Rollout {
    /// What is done with them.
    pub mode: Mode,
    /// The share of the requests that is active; the rest is in shadow. Counts where the mode is active.
    pub percent: Percent,
}

impl Default for Rollout {
    /// All of them are.
    fn default() -> Self {
        Self { mode: Mode::Active, percent: Percent::ALL }
    }
}

impl Rollout {
    /// The same under another mode too: the stricter one holds.
    #[must_use]
    pub fn under(self, mode: Mode) -> Self {
        Self { mode: self.mode.max(mode), ..self }
    }

    /// What is done for one request. `random` decides where the request has no id.
    pub fn mode_for(self, request_id: Option<&str>, random: &mut fastrand::Rng) -> Mode {
        let percent = self.percent.get();
        if self.mode != Mode::Active || percent == 100 {
            return self.mode;
        }
        let draw = request_id.map_or_else(|| random.u64(..100), |id| xxh3_64(id.as_bytes()) % 100);
        if draw < u64::from(percent) { Mode::Active } else { Mode::Shadow }
    }
}

/// A pool's rollout, which may change while requests come.
#[derive(Debug)]
pub struct Switch(AtomicU16);

impl Default for Switch {
    /// All picks are followed.
    fn default() -> Self {
        Self(AtomicU16::new(pack(Rollout::default())))
    }
}

impl Switch {
    /// What holds now.
    pub fn get(&self) -> Rollout {
        let [mode, percent] = self.0.load(Relaxed).to_be_bytes();
        Rollout { mode: Mode::ALL[usize::from(mode)], percent: Percent(percent) }
    }

    /// Makes `rollout` hold for the requests that come from now on.
    pub fn set(&self, rollout: Rollout) {
        self.0.store(pack(rollout), Relaxed);
    }
}

fn pack(rollout: Rollout) -> u16 {
    u16::from_be_bytes([rollout.mode as u8, rollout.percent.get()])
}

#[cfg(test)]
mod tests {
    use super::*;

    fn share(percent: &str) -> Rollout {
        Rollout { mode: Mode::Active, percent: percent.parse().expect("a share") }
    }

    fn active(rollout: Rollout, ids: &[String]) -> Vec<&String> {
        let mut random = fastrand::Rng::with_seed(1);
        let is_active = |id: &&String| rollout.mode_for(Some(id), &mut random) == Mode::Active;
        ids.iter().filter(is_active).collect()
    }

    #[test]
    fn a_switch_returns_what_it_was_set_to() {
        let switch = Switch::default();
        assert_eq!(switch.get(), Rollout::default());
        for mode in Mode::ALL {
            for percent in 0..=100 {
                let rollout = Rollout { mode, percent: Percent(percent) };
                switch.set(rollout);
                assert_eq!(switch.get(), rollout);
            }
        }
    }

    #[test]
    fn the_stricter_mode_holds() {
        let with = |mode| Rollout { mode, percent: Percent(30) };
        for (own, global, expected) in [
            (Mode::Active, Mode::Active, Mode::Active),
            (Mode::Active, Mode::Shadow, Mode::Shadow),
            (Mode::Shadow, Mode::Active, Mode::Shadow),
            (Mode::Off, Mode::Shadow, Mode::Off),
            (Mode::Active, Mode::Off, Mode::Off),
        ] {
            assert_eq!(with(own).under(global), with(expected));
        }
    }

    #[test]
    fn a_share_is_stable_near_its_size_and_grows_without_moving_anyone() {
        let ids: Vec<String> = (0..1_000).map(|n| format!("3f2a7c1e-0000-4000-8000-{n:012x}")).collect();
        let mut before = Vec::new();
        for percent in [0_u16, 1, 10, 50, 90, 100] {
            let rollout = share(&percent.to_string());
            let now = active(rollout, &ids);
            assert_eq!(now, active(rollout, &ids), "the same ids at {percent} %");
            // Four standard deviations of 1,000 draws at one half.
            assert!(now.len().abs_diff(usize::from(percent) * 10) <= 63, "{} at {percent} %", now.len());
            assert!(before.iter().all(|id| now.contains(id)), "someone left at {percent} %");
            before = now;
        }
        assert_eq!(before.len(), 1_000);
        assert_eq!(active(share("0"), &ids).len(), 0);
    }

    #[test]
    fn requests_without_an_id_are_drawn() {
        let mut random = fastrand::Rng::with_seed(1);
        let n_active = (0..1_000).filter(|_| share("25").mode_for(None, &mut random) == Mode::Active).count();
        assert!((190..310).contains(&n_active), "{n_active}");
    }

    #[test]
    fn only_active_pools_have_a_share() {
        let mut random = fastrand::Rng::with_seed(1);
        for mode in [Mode::Shadow, Mode::Off] {
            assert_eq!(share("100").under(mode).mode_for(Some("id"), &mut random), mode);
            assert_eq!(share("0").under(mode).mode_for(Some("id"), &mut random), mode);
        }
    }

    #[test]
    fn what_is_no_mode_and_no_share_is_refused() {
        for text in ["", "on", "Active"] {
            assert!(text.parse::<Mode>().is_err(), "{text}");
        }
        for text in ["", "-1", "101", "1.5", "256"] {
            assert!(text.parse::<Percent>().is_err(), "{text}");
        }
    }
}
