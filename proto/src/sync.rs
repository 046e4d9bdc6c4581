//! The messages of a stream between two daemons. Messages travel in one direction: each host connects to every live
//! peer, and sends its requests and its replies over the connection that it opened.

use std::net::IpAddr;

use serde::{Deserialize, Serialize};

use crate::alloc::AllocMessage;
use crate::clock::Stamp;
use crate::id::{NetworkId, NodeId};
use crate::object::{ObjectKey, SignedObject};
use crate::record::SignedRecord;
use crate::secret::Secret;
use crate::table::Update;
use crate::wire::fields::variants;

/// A message from one daemon to another. A receiver that does not know a message, or what is in it, ignores and counts
/// it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Message {
    /// The sender's record, for a receiver that does not have it from gossip yet.
    Record(SignedRecord),
    /// A change of a table, pushed by its owner, or a whole table, from any host that has it.
    Table(Update),
    /// A request for the whole table of a host.
    TablePull(NodeId),
    /// The reply to [`Self::TablePull`] if the receiver does not have the table.
    TableUnknown(NodeId),
    /// Objects: pushed when they are written, or sent on request.
    Objects(Vec<SignedObject>),
    /// The hashes of the parts of the sender's object digest. The reply is [`Self::ObjectIndex`].
    ObjectParts(Vec<u64>),
    /// The key and stamp of each object of the sender in the parts that differ.
    ObjectIndex(Vec<(ObjectKey, Stamp)>),
    /// A request for objects, each with the stamp of what the sender has, which is the default if it has none. The reply
    /// is [`Self::Objects`], in several messages, the last of which is empty. It may leave out objects, which can be
    /// requested again.
    ObjectWant(Vec<(ObjectKey, Stamp)>),
    /// A message of the consensus on the allocation map.
    Alloc(AllocMessage),
    /// A request for a lease of an address of the receiver's block.
    LeaseRequest {
        /// The requester's number.
        id: u64,
        /// The network.
        network: NetworkId,
        /// The requested address.
        wish: LeaseWish,
    },
    /// The reply to [`Self::LeaseRequest`].
    LeaseReply {
        /// The requester's number.
        id: u64,
        /// The address, or an error message for the user.
        result: Result<IpAddr, String>,
    },
    /// The cluster key that the allocation map names, for a member that does not have it.
    ClusterKey(Secret<[u8; 32]>),
    /// A request for a diagnosis of the receiver, as an operator asked for one. The reply is [`Self::DoctorReply`].
    DoctorRequest {
        /// The requester's number.
        id: u64,
    },
    /// The reply to [`Self::DoctorRequest`].
    DoctorReply {
        /// The requester's number.
        id: u64,
        /// The diagnosis, in JSON.
        diagnosis: String,
    },
    /// A part of a trace, which `ovlctl trace` requested on any host: what to do, as JSON of the daemon's own.
    TraceAsk {
        /// The requester's number.
        id: u64,
        /// At most [`MAX_TRACE`] bytes.
        ask: String,
    },
    /// The reply to [`Self::TraceAsk`].
    TraceReply {
        /// The requester's number.
        id: u64,
        /// What was found, as JSON of the daemon's own, or an error message for the user.
        result: Result<String, String>,
    },
    /// A request for the time by the receiver's clock, before a capture. The reply is [`Self::TimeReply`].
    TimeRequest {
        /// The requester's number.
        id: u64,
    },
    /// The reply to [`Self::TimeRequest`].
    TimeReply {
        /// The requester's number.
        id: u64,
        /// Nanoseconds since 1970.
        now_ns: u64,
    },
    /// A request to capture packets, which `ovlctl capture` made on any host, as JSON of the daemon's own.
    CaptureStart {
        /// The requester's number.
        id: u64,
        /// At most [`crate::capture::MAX_MESSAGE`] bytes.
        ask: String,
    },
    /// What was captured: a [`crate::capture::CaptureBatch`] in JSON.
    CaptureBatch {
        /// The requester's number.
        id: u64,
        /// At most [`crate::capture::MAX_MESSAGE`] bytes.
        batch: String,
    },
    /// The requester has taken this many batches. Without it, a host sends no more than a few.
    CaptureTaken {
        /// The requester's number.
        id: u64,
        /// The number of batches.
        batches: u32,
    },
    /// Ends a capture.
    CaptureStop {
        /// The requester's number.
        id: u64,
    },
    /// A request for who talks to whom on the receiver, as far as the kernel knows it now. The reply is [`Self::FlowsReply`].
    FlowsRequest {
        /// The requester's number.
        id: u64,
    },
    /// The reply to [`Self::FlowsRequest`].
    FlowsReply {
        /// The requester's number.
        id: u64,
        /// The flows, in JSON.
        flows: String,
    },
    /// A request to follow who talks to whom on the receiver: [`Self::FlowsSecond`], until [`Self::FlowsStop`].
    FlowsFollow {
        /// The requester's number.
        id: u64,
        /// The maximum number of flows in a reply.
        most: u32,
    },
    /// What was seen since the last one, in JSON. The next one is sent after [`Self::FlowsTaken`], at the earliest a second later.
    FlowsSecond {
        /// The requester's number.
        id: u64,
        /// The flows, in JSON.
        flows: String,
    },
    /// The requester has taken a [`Self::FlowsSecond`].
    FlowsTaken {
        /// The requester's number.
        id: u64,
    },
    /// Ends what [`Self::FlowsFollow`] began.
    FlowsStop {
        /// The requester's number.
        id: u64,
    },
    /// A request for what the receiver says of itself: how it sees other hosts, and counters. The reply is
    /// [`Self::ReportReply`].
    ReportRequest {
        /// The requester's number.
        id: u64,
    },
    /// The reply to [`Self::ReportRequest`].
    ReportReply {
        /// The requester's number.
        id: u64,
        /// The report, in JSON.
        report: String,
    },
}

/// The maximum length of what is said of a trace, in bytes.
pub const MAX_TRACE: usize = 256 << 10;

variants! {
    Message {
        1 Record { 1 0: record },
        2 Table { 1 0: update },
        3 TablePull { 1 0: node },
        4 TableUnknown { 1 0: node },
        5 Objects { 1 0: objects },
        6 ObjectIndex { 1 0: index },
        7 Alloc { 1 0: message },
        8 LeaseRequest { 1 id: id, 2 network: network, 3 wish: wish },
        9 LeaseReply { 1 id: id, 2 result: result },
        10 ClusterKey { 1 0: key },
        11 ObjectParts { 1 0: parts },
        12 ObjectWant { 1 0: wanted },
        13 TraceAsk { 1 id: id, 2 ask: ask },
        14 TraceReply { 1 id: id, 2 result: result },
        15 DoctorRequest { 1 id: id },
        16 DoctorReply { 1 id: id, 2 diagnosis: diagnosis },
        110 FlowsRequest { 1 id: id },
        111 FlowsReply { 1 id: id, 2 flows: flows },
        112 FlowsFollow { 1 id: id, 2 most: most },
        113 FlowsSecond { 1 id: id, 2 flows: flows },
        114 FlowsTaken { 1 id: id },
        115 FlowsStop { 1 id: id },
        130 TimeRequest { 1 id: id },
        131 TimeReply { 1 id: id, 2 now_ns: now_ns },
        132 CaptureStart { 1 id: id, 2 ask: ask },
        133 CaptureBatch { 1 id: id, 2 batch: batch },
        134 CaptureTaken { 1 id: id, 2 batches: batches },
        135 CaptureStop { 1 id: id },
        150 ReportRequest { 1 id: id },
        151 ReportReply { 1 id: id, 2 report: report },
    }
}

/// The address that a lease request asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum LeaseWish {
    /// This address.
    Exact(IpAddr),
    /// Any free address of this subnet.
    AnyOf(ipnet::IpNet),
}
