//! Two paths that are measured in turns, in whatever state the machine is in.

use anyhow::{Context, Result};
use netns_lab::Netns;
use serde_json::{Value, json};

use super::plan::Plan;
use super::stats::{Samples, round};
use super::stream::{Cores, Path, Speed};

/// What both paths gave, turn by turn.
#[derive(Default)]
pub(crate) struct Turns {
    overlay: Vec<Speed>,
    hand: Vec<Speed>,
}

impl Turns {
    /// Many short turns: the best of them is steadier than that of a few long ones.
    pub(crate) fn take(plan: &Plan, overlay: &Path, hand: &Path, cores: Cores) -> Result<Self> {
        let mut turns = Turns::default();
        for turn in 0..plan.turns {
            // Each is as often the first as the second of a pair.
            if turn % 2 == 0 {
                turns.overlay.push(overlay.run(plan.stream, cores)?);
                turns.hand.push(hand.run(plan.stream, cores)?);
            } else {
                turns.hand.push(hand.run(plan.stream, cores)?);
                turns.overlay.push(overlay.run(plan.stream, cores)?);
            }
        }
        Ok(turns)
    }

    pub(crate) fn overlay_gbit_s(&self) -> Samples {
        gbit_s(&self.overlay)
    }

    pub(crate) fn hand_gbit_s(&self) -> Samples {
        gbit_s(&self.hand)
    }

    pub(crate) fn ratio(&self) -> f64 {
        self.overlay_gbit_s().median() / self.hand_gbit_s().median()
    }

    /// Other work on the machine slows a turn down, to half if it gets the same core, and never
    /// speeds it up. Where it hits one path more than the other, medians say 1.19 of what is 0.85.
    pub(crate) fn best_ratio(&self) -> f64 {
        self.overlay_gbit_s().max() / self.hand_gbit_s().max()
    }

    pub(crate) fn to_json(&self) -> Value {
        let pairs = self.overlay.iter().zip(&self.hand);
        let ratios = Samples::new(pairs.map(|(ours, theirs)| ours.gbit_s / theirs.gbit_s).collect());
        json!({
            "overlay": to_json(&self.overlay),
            "by_hand": to_json(&self.hand),
            "ratio_of_each_turn": ratios.to_json(),
        })
    }
}

/// Of the interface in a workload.
pub(crate) fn mtu_of(workload: &Netns) -> Result<u64> {
    let link = workload.ip_json(&["link", "show", "eth0"])?;
    link[0]["mtu"].as_u64().with_context(|| format!("no MTU in {link}"))
}

pub(crate) fn gbit_s(runs: &[Speed]) -> Samples {
    Samples::new(runs.iter().map(|run| run.gbit_s).collect())
}

pub(crate) fn to_json(runs: &[Speed]) -> Value {
    json!({
        "gbit_s": runs.iter().map(|run| round(run.gbit_s)).collect::<Vec<_>>(),
        "retransmits": runs.iter().map(|run| run.retransmits).collect::<Vec<_>>(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_best_turns_decide() {
        let speeds = |all: &[f64]| all.iter().map(|&gbit_s| Speed { gbit_s, retransmits: 0 }).collect();
        let turns = Turns { overlay: speeds(&[9.0, 19.0, 10.0]), hand: speeds(&[20.0, 10.0, 5.0]) };
        assert_eq!((turns.best_ratio(), turns.ratio()), (0.95, 1.0));
    }
}
