//! Hides a feature of the kernel from a process, so that what it does on an older one can be tried here.

use std::collections::BTreeMap;

use anyhow::{Context, Result};
use nix::libc;
use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter, SeccompRule,
};

// Of `enum bpf_cmd` in `linux/bpf.h`.
const BPF_PROG_QUERY: u64 = 16;
const BPF_LINK_CREATE: u64 = 28;

/// Has the kernel answer the calling thread, and the processes that it starts, as if it had no tcx.
pub(crate) fn hide() -> Result<()> {
    let refused = [BPF_PROG_QUERY, BPF_LINK_CREATE].map(|command| {
        let is = SeccompCondition::new(0, SeccompCmpArgLen::Dword, SeccompCmpOp::Eq, command)?;
        SeccompRule::new(vec![is])
    });
    let rules = refused.into_iter().collect::<std::result::Result<_, _>>()?;
    let filter: BpfProgram = SeccompFilter::new(
        BTreeMap::from([(libc::SYS_bpf, rules)]),
        SeccompAction::Allow,
        SeccompAction::Errno(libc::EINVAL as u32),
        std::env::consts::ARCH.try_into().context("seccomp does not know this processor")?,
    )?
    .try_into()?;
    seccompiler::apply_filter(&filter).context("cannot hide tcx")
}
