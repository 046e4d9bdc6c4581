//! What the condition NetworkUnavailable of this host's Node is to say. Pure: no clock, no I/O.

use std::time::Duration;

use serde_json::{Value, json};

/// The type of the condition.
const TYPE: &str = "NetworkUnavailable";
/// For this time, what is wrong may pass by itself: ovld is restarted within it.
const PASSES_WITHIN: Duration = Duration::from_secs(10);

/// What ovld says of itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Health {
    /// It is not connected.
    Silent,
    /// It says that new pods would fail, and why.
    Unready(String),
    /// New pods become reachable.
    Ready,
}

/// The condition as the API server has it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Condition {
    /// `True`, `False` or `Unknown`.
    status: String,
    reason: String,
    message: String,
    last_transition: String,
}

impl Condition {
    /// Finds the condition of a Node. `None` if it has none.
    pub(crate) fn of(node: &Value) -> Option<Self> {
        let all = node.pointer("/status/conditions")?.as_array()?;
        let found = all.iter().find(|condition| condition.get("type").is_some_and(|it| it == TYPE))?;
        let text = |field: &str| found.get(field).and_then(Value::as_str).unwrap_or_default().to_owned();
        Some(Self {
            status: text("status"),
            reason: text("reason"),
            message: text("message"),
            last_transition: text("lastTransitionTime"),
        })
    }

    /// Returns the patch that makes this the condition of a Node.
    pub(crate) fn patch(&self, now: &str) -> Value {
        json!({ "status": { "conditions": [{
            "type": TYPE, "status": self.status, "reason": self.reason, "message": self.message,
            "lastHeartbeatTime": now, "lastTransitionTime": self.last_transition,
        }] } })
    }
}

/// Decides what is to be written. `lasted` is for how long ovld has said so. `None` if nothing is, or not yet.
pub(crate) fn due(
    has: Option<&Condition>,
    health: &Health,
    lasted: Duration,
    now: &str,
) -> Option<Condition> {
    let (status, reason, message) = match health {
        Health::Ready => ("False", "OvldReady", "ovld makes pods reachable"),
        Health::Unready(why) => ("True", "OvldNotReady", why.as_str()),
        Health::Silent => ("True", "OvldNotRunning", "ovld does not run, or does not answer"),
    };
    let is_available = has.is_some_and(|has| has.status == "False");
    if is_available && status == "True" && lasted < PASSES_WITHIN {
        return None;
    }
    let last_transition = match has {
        Some(has) if (&*has.status, &*has.reason, &*has.message) == (status, reason, message) => return None,
        Some(has) if has.status == status && !has.last_transition.is_empty() => has.last_transition.clone(),
        Some(_) | None => now.to_owned(),
    };
    let [status, reason, message] = [status, reason, message].map(str::to_owned);
    Some(Condition { status, reason, message, last_transition })
}

/// Returns after which time a decision may be another one, although nothing has happened. `None`: only something that happens
/// changes it.
pub(crate) fn reconsider_in(health: &Health, lasted: Duration) -> Option<Duration> {
    match health {
        Health::Ready => None,
        Health::Unready(_) | Health::Silent => {
            PASSES_WITHIN.checked_sub(lasted).filter(|rest| !rest.is_zero())
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]

    use super::*;

    const SHORT: Duration = Duration::from_secs(3);

    fn node(status: &str, since: &str) -> Value {
        json!({ "status": { "conditions": [
            { "type": "Ready", "status": "True" },
            { "type": TYPE, "status": status, "reason": "OvldReady", "message": "ovld makes pods reachable",
              "lastTransitionTime": since },
        ] } })
    }

    #[test]
    fn a_node_without_the_condition_gets_it_at_once() {
        assert_eq!(Condition::of(&json!({ "status": {} })), None);
        for (health, status) in
            [(Health::Ready, "False"), (Health::Silent, "True"), (Health::Unready("x".to_owned()), "True")]
        {
            let written = due(None, &health, Duration::ZERO, "t1").unwrap();
            let patch = written.patch("t1");
            assert_eq!(patch["status"]["conditions"][0]["status"], status);
            assert_eq!(patch["status"]["conditions"][0]["lastTransitionTime"], "t1");
        }
    }

    #[test]
    fn a_restart_of_ovld_changes_nothing_and_an_outage_does() {
        let has = Condition::of(&node("False", "t0")).unwrap();
        assert_eq!(due(Some(&has), &Health::Ready, SHORT, "t1"), None);
        assert_eq!(due(Some(&has), &Health::Silent, SHORT, "t1"), None);
        assert_eq!(reconsider_in(&Health::Silent, SHORT), Some(PASSES_WITHIN - SHORT));
        let outage = due(Some(&has), &Health::Silent, PASSES_WITHIN, "t1").unwrap();
        assert_eq!((&*outage.status, &*outage.last_transition), ("True", "t1"));
        assert_eq!(reconsider_in(&Health::Silent, PASSES_WITHIN), None);
        // Another reason is no transition.
        let other = due(Some(&outage), &Health::Unready("no block".to_owned()), SHORT, "t2").unwrap();
        assert_eq!((&*other.message, &*other.last_transition), ("no block", "t1"));
        let back = due(Some(&other), &Health::Ready, Duration::ZERO, "t3").unwrap();
        assert_eq!((&*back.status, &*back.last_transition), ("False", "t3"));
    }
}
