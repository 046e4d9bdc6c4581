//! What `ovlctl doctor` checks and finds.

use serde::{Deserialize, Serialize};

use crate::Severity;

/// The reply to [`crate::Request::Doctor`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Diagnosis {
    /// Whether nothing was found, and every host that was asked answered.
    pub healthy: bool,
    /// The hosts, the local host first, then by name.
    pub hosts: Vec<HostDiagnosis>,
    /// The names of the hosts that were asked and did not answer in time.
    pub unanswered: Vec<String>,
}

/// What was checked and found on one host.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct HostDiagnosis {
    /// The host's name.
    pub host: String,
    /// How long the checks took, in milliseconds.
    pub took_ms: u64,
    /// All checks, in a fixed order.
    pub checks: Vec<Check>,
    /// What is wrong, the most likely cause of the others first.
    pub findings: Vec<Finding>,
}

/// A check and its result.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Check {
    /// The group: what the check is about, such as `names`.
    pub group: String,
    /// The check within its group, such as `upstream`.
    pub check: String,
    /// The result: that of its worst finding.
    pub result: CheckResult,
    /// A remark, such as why it could not be checked, or what is in progress.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub detail: String,
}

/// The result of a check.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum CheckResult {
    /// Nothing was found.
    Ok,
    /// It could not be checked.
    Unknown,
    /// There is a finding with [`Severity::Warning`], and none with [`Severity::Error`].
    Warning,
    /// There is a finding with [`Severity::Error`].
    Error,
}

impl From<Severity> for CheckResult {
    fn from(severity: Severity) -> Self {
        match severity {
            Severity::Error => Self::Error,
            Severity::Warning => Self::Warning,
        }
    }
}

/// Something that is wrong.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Finding {
    /// The stable code of the problem: see `docs/problems.md`.
    pub code: String,
    /// The severity.
    pub severity: Severity,
    /// The group of its check.
    pub group: String,
    /// Its check.
    pub check: String,
    /// What it is about. Empty: the host.
    pub object: String,
    /// What is wrong, in a sentence. For a problem that `ovlctl status` shows too, this is its message, which also says
    /// what to do.
    pub cause: String,
    /// What to do. Empty if `cause` says it.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub fix: String,
}
