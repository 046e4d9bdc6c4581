//! Whether packets of this host may take the fast path.
//!
//! [`FastPathUse`] owns the state: the daemon finds out what stands in the way, and who follows packets in the stack.

use std::collections::BTreeMap;

use ovl_dataplane::device::Device;

/// What can stand in the way of the fast path.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Obstacle {
    /// The configuration.
    Configured,
    /// The kernel, or what the daemon may do.
    Kernel,
    /// Packets that take the fast path would bypass rules of other programs.
    Rules,
}

/// Whether packets of this host may take the fast path.
#[derive(Debug, Clone)]
pub struct FastPathUse {
    obstacles: BTreeMap<Obstacle, String>,
    underlay: Option<Device>,
    paused: bool,
}

impl Default for FastPathUse {
    fn default() -> Self {
        let obstacles = BTreeMap::from([(Obstacle::Configured, "it is off, as configured".to_owned())]);
        Self { obstacles, underlay: None, paused: false }
    }
}

impl FastPathUse {
    /// Begins to look for what stands in the way. `opened` says whether an earlier run has left programs in use, or why they
    /// cannot be loaded. What is in use is not given up because the rules of other programs are not known yet.
    pub fn begin(&mut self, opened: Result<bool, String>) {
        let is_in_use = opened.as_ref().is_ok_and(|is_in_use| *is_in_use);
        let rules = (!is_in_use).then(|| "the rules of other programs are not known".to_owned());
        self.set_obstacle(Obstacle::Configured, None);
        self.set_obstacle(Obstacle::Kernel, opened.err());
        self.set_obstacle(Obstacle::Rules, rules);
    }

    /// Sets what stands in the way, in a sentence, or that nothing of this kind does. Returns whether that is new.
    pub fn set_obstacle(&mut self, obstacle: Obstacle, sentence: Option<String>) -> bool {
        let before = match sentence.clone() {
            Some(sentence) => self.obstacles.insert(obstacle, sentence),
            None => self.obstacles.remove(&obstacle),
        };
        before != sentence
    }

    /// Sets the device of the underlay. Returns whether it is another one.
    pub fn set_underlay(&mut self, device: Option<Device>) -> bool {
        std::mem::replace(&mut self.underlay, device) != device
    }

    /// Sets whether packets are to be seen in the stack, so that the fast path pauses. Returns whether that is new.
    pub fn set_paused(&mut self, paused: bool) -> bool {
        std::mem::replace(&mut self.paused, paused) != paused
    }

    /// Whether it pauses, because packets are to be seen in the stack.
    pub fn is_paused(&self) -> bool {
        self.paused
    }

    /// Returns the device of the underlay if the fast path is used.
    pub fn underlay(&self) -> Option<Device> {
        self.underlay.filter(|_| self.obstacles.is_empty())
    }

    /// Whether the fast path is off by the configuration.
    pub fn is_configured(&self) -> bool {
        !self.obstacles.contains_key(&Obstacle::Configured)
    }

    /// Returns why the fast path is not used. `None` if it is.
    pub fn why_not(&self) -> Option<&str> {
        let first = self.obstacles.values().next().map(String::as_str);
        first.or_else(|| {
            self.underlay
                .is_none()
                .then_some("the device of the underlay is not known, or has no Ethernet headers")
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_in_use_goes_on_until_something_stands_in_the_way() {
        let begun = |opened| {
            let mut local = FastPathUse::default();
            local.set_underlay(Device::new("eth0"));
            local.begin(opened);
            local
        };
        let mut left = begun(Ok(true));
        assert_eq!(left.underlay(), Device::new("eth0"));
        left.set_obstacle(Obstacle::Rules, Some("ufw".to_owned()));
        assert_eq!(left.underlay(), None);
        let mut first = begun(Ok(false));
        assert_eq!(first.underlay(), None);
        first.set_obstacle(Obstacle::Rules, None);
        assert_eq!(first.underlay(), Device::new("eth0"));
        assert_eq!(begun(Err("no BPF file system".to_owned())).why_not(), Some("no BPF file system"));
    }

    #[test]
    fn each_obstacle_is_enough() {
        let mut local = FastPathUse::default();
        assert!(!local.is_configured());
        assert!(local.set_underlay(Device::new("eth0")));
        assert_eq!(local.underlay(), None);
        assert!(local.set_obstacle(Obstacle::Configured, None));
        assert_eq!((local.underlay(), local.why_not()), (Device::new("eth0"), None));
        assert!(local.set_obstacle(Obstacle::Rules, Some("ufw".to_owned())));
        assert!(!local.set_obstacle(Obstacle::Rules, Some("ufw".to_owned())));
        assert_eq!((local.underlay(), local.why_not()), (None, Some("ufw")));
    }
}
