//! Attaches the programs of the fast path where the kernel has no tcx: as filters of the queueing discipline `clsact`
//! (tc-bpf(8)).
//!
//! Filters of ovl have a priority and handles of their own, by which a later run finds and replaces them. Filters of other
//! programs stay, as does a `clsact` that another program has created: a folder in the BPF file system marks those of ovl.
//!
//! [`Clsact`] owns a netlink socket and those marks. Begin to read at [`Clsact::set`].

use std::fs;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::path::{Path, PathBuf};

use nix::libc;
use ovl_fastpath::{Filters, Program};

use super::attribute::{Attributes, Message, attributes, text, u32_at};
use super::error::{KernelError, Result};
use super::localnet::{CLSACT, CLSACT_HANDLE, INGRESS, TCA_BPF_FLAG_ACT_DIRECT, TCA_BPF_FLAGS};
use super::message::{TRAFFIC_CONTROL, traffic_control};
use super::socket::{Batch, Dump, Route};

/// The priority of the filters. Other programs' come first: if they have no priority of their own, the kernel gives them
/// 49,152 or less.
const PRIORITY: u16 = 50_000;
/// The handles of the filters: "ovl", and the number of the program in the lowest byte.
const HANDLES: u32 = 0x6f76_6c00;

const KIND: &str = "clsact";
// The parents of filters are in `linux/pkt_sched.h`, attributes of filters in `linux/pkt_cls.h`.
const EGRESS: u32 = 0xffff_fff3;
const TCA_BPF_FD: u16 = 6;
const TCA_BPF_NAME: u16 = 7;
/// Where fields of `struct tcmsg` are.
const IFINDEX: usize = 4;
const HANDLE: usize = 8;
const INFO: usize = 16;

/// The priority and the protocol of filters, as `tcm_info` has them.
const PRIORITY_AND_PROTOCOL: u32 = (PRIORITY as u32) << 16 | (libc::ETH_P_ALL as u16).to_be() as u32;

/// The filters of ovl in one network namespace.
#[derive(Debug)]
pub(super) struct Clsact {
    route: Route,
    /// The folder with an empty folder for each device whose `clsact` is ovl's, by the index.
    marks: PathBuf,
}

fn kind_of<'a>(message: &Message<'a>) -> &'a str {
    attributes(message.payload, TRAFFIC_CONTROL)
        .find(|(kind, _)| *kind == libc::TCA_KIND)
        .map_or("", |(_, value)| text(value))
}

fn number(program: Program) -> u32 {
    match program {
        Program::Pod => 1,
        Program::Underlay => 2,
        Program::Stack => 3,
    }
}

fn side(program: Program) -> u32 {
    if program.is_egress() { EGRESS } else { INGRESS }
}

/// Returns the program of a filter of ovl, by what the kernel says of it.
fn program_of(message: &Message<'_>, parent: u32) -> Option<Program> {
    let info = u32_at(message.payload, INFO)?;
    let handle = u32_at(message.payload, HANDLE)?;
    let is_own = info == PRIORITY_AND_PROTOCOL && kind_of(message) == "bpf";
    let named = |program: &Program| handle == HANDLES | number(*program) && side(*program) == parent;
    Program::ALL.into_iter().find(named).filter(|_| is_own)
}

impl Clsact {
    /// In the network namespace of the calling thread. `folder` is in the BPF file system.
    pub(super) fn open(folder: &Path) -> Result<Self> {
        Ok(Self { route: Route::open()?, marks: folder.join("qdiscs") })
    }

    /// Returns the devices with a `clsact` of any program.
    fn devices(&mut self) -> Result<Vec<u32>> {
        let dump = self.dump(libc::RTM_GETQDISC, &traffic_control(0, 0, 0, 0))?;
        let found = dump.messages().filter(|message| kind_of(message) == KIND);
        Ok(found.filter_map(|message| u32_at(message.payload, IFINDEX)).collect())
    }

    /// Returns all filters of a side of a device: the program, or `None` of one that is not ovl's.
    fn filters(&mut self, ifindex: u32, side: u32) -> Result<Vec<Option<Program>>> {
        let dump = self.dump(libc::RTM_GETTFILTER, &traffic_control(ifindex, 0, side, 0))?;
        // A priority without a handle is not a filter, but a list of them.
        let filters = dump.messages().filter(|message| {
            message.kind == libc::RTM_NEWTFILTER && u32_at(message.payload, HANDLE).is_some_and(|it| it != 0)
        });
        Ok(filters.map(|message| program_of(&message, side)).collect())
    }

    fn dump(&mut self, kind: u16, request: &[u8]) -> Result<Dump> {
        let mut batch = Batch::default();
        batch.push_built(kind, 0, request);
        self.route
            .dump_built(batch)?
            .map_err(|refusal| refusal.into_error("cannot read the filters of a device"))
    }

    /// Sends a request. Returns the error number of a refusal that is among `fine`.
    fn ask(
        &mut self,
        what: &str,
        kind: u16,
        flags: i32,
        payload: &[u8],
        fine: &[i32],
    ) -> Result<Option<i32>> {
        let mut batch = Batch::default();
        batch.push_built(kind, flags as u16, payload);
        let (mut results, _) = self.route.execute(batch)?;
        match results.pop() {
            Some(Err(refusal)) if fine.contains(&refusal.errno) => Ok(Some(refusal.errno)),
            Some(Err(refusal)) => Err(refusal.into_error(what)),
            Some(Ok(())) | None => Ok(None),
        }
    }

    /// Creates the `clsact` of a device, if there is none.
    fn prepare(&mut self, ifindex: u32) -> Result<()> {
        let mark = self.marks.join(ifindex.to_string());
        // Before it is created: a run that ends in between must not leave one that is taken for another program's.
        let is_new = !mark.exists() && fs::create_dir_all(&mark).is_ok();
        let mut request = Attributes::after(&traffic_control(ifindex, CLSACT_HANDLE, CLSACT, 0));
        request.put_text(libc::TCA_KIND, KIND);
        let flags = libc::NLM_F_CREATE | libc::NLM_F_EXCL;
        let what = "cannot create the queueing discipline clsact";
        let refused = self.ask(what, libc::RTM_NEWQDISC, flags, request.bytes(), &[libc::EEXIST]);
        if is_new && !matches!(refused, Ok(None)) {
            let _ = fs::remove_dir(&mark);
        }
        let is_there = refused?.is_some();
        if is_there && is_new && !self.devices()?.contains(&ifindex) {
            return Err(KernelError::Other(
                "the device has the queueing discipline `ingress` of another program, which excludes clsact"
                    .to_owned(),
            ));
        }
        Ok(())
    }

    fn set_filter(&mut self, ifindex: u32, program: Program, loaded: BorrowedFd<'_>) -> Result<()> {
        let handle = HANDLES | number(program);
        let mut request =
            Attributes::after(&traffic_control(ifindex, handle, side(program), PRIORITY_AND_PROTOCOL));
        request.put_text(libc::TCA_KIND, "bpf");
        request.nest(libc::TCA_OPTIONS, |options| {
            options.put(TCA_BPF_FD, &loaded.as_raw_fd().to_ne_bytes());
            options.put_text(TCA_BPF_NAME, program.name());
            options.put(TCA_BPF_FLAGS, &TCA_BPF_FLAG_ACT_DIRECT.to_ne_bytes());
        });
        // Without NLM_F_EXCL the kernel replaces the program of a filter that is there, at once.
        let what = "cannot set a filter of a device";
        self.ask(what, libc::RTM_NEWTFILTER, libc::NLM_F_CREATE, request.bytes(), &[]).map(drop)
    }

    fn remove_filters(&mut self, ifindex: u32) -> Result<()> {
        let mut is_used = false;
        // A device that is gone has no filters either.
        let gone = [libc::ENOENT, libc::EINVAL, libc::ENODEV];
        for side in [INGRESS, EGRESS] {
            for filter in self.filters(ifindex, side)? {
                let Some(program) = filter else {
                    is_used = true;
                    continue;
                };
                let request =
                    traffic_control(ifindex, HANDLES | number(program), side, PRIORITY_AND_PROTOCOL);
                self.ask("cannot delete a filter of a device", libc::RTM_DELTFILTER, 0, &request, &gone)?;
            }
        }
        let mark = self.marks.join(ifindex.to_string());
        if mark.exists() {
            if !is_used {
                let request = traffic_control(ifindex, CLSACT_HANDLE, CLSACT, 0);
                self.ask("cannot delete a queueing discipline", libc::RTM_DELQDISC, 0, &request, &gone)?;
            }
            let _ = fs::remove_dir(&mark);
        }
        Ok(())
    }

    /// Deletes the filters of ovl on all devices.
    pub(super) fn remove_all(&mut self) -> Result<()> {
        for ifindex in self.devices()? {
            self.remove_filters(ifindex)?;
        }
        for mark in fs::read_dir(&self.marks).into_iter().flatten().flatten() {
            let _ = fs::remove_dir(mark.path());
        }
        let _ = fs::remove_dir(&self.marks);
        Ok(())
    }
}

impl Filters for Clsact {
    fn list(&mut self) -> std::result::Result<Vec<(u32, Program)>, String> {
        let mut all = Vec::new();
        for ifindex in self.devices().map_err(|error| error.to_string())? {
            for side in [INGRESS, EGRESS] {
                // The device may have gone in the meantime.
                let found = self.filters(ifindex, side).unwrap_or_default();
                all.extend(found.into_iter().filter_map(|filter| Some((ifindex, filter?))));
            }
        }
        Ok(all)
    }

    fn set(
        &mut self,
        ifindex: u32,
        program: Program,
        loaded: BorrowedFd<'_>,
    ) -> std::result::Result<(), String> {
        self.prepare(ifindex)
            .and_then(|()| self.set_filter(ifindex, program, loaded))
            .map_err(|error| error.to_string())
    }

    fn remove(&mut self, ifindex: u32) -> std::result::Result<(), String> {
        self.remove_filters(ifindex).map_err(|error| error.to_string())
    }
}
