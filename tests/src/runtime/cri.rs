//! A client of the Container Runtime Interface (CRI): the messages that the tests require_program, and unary gRPC calls over
//! the runtime's socket.

use std::collections::BTreeMap;
use std::future::poll_fn;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use bytes::{BufMut as _, Bytes, BytesMut};
use http::{HeaderMap, Request};
use prost::Message;
use tokio::net::UnixStream;

/// Time limit of a call.
const TIMEOUT: Duration = Duration::from_secs(60);

/// Length of the header before each gRPC message: one byte for compression, four for the length.
const PREFIX: usize = 5;

/// A request message, with its method and its response message.
pub(super) trait Call: Message {
    /// The response message.
    type Answer: Message + Default;
    /// Service and method name.
    const METHOD: &'static str;
}

/// Calls a method of the runtime that listens on this socket.
pub(super) fn call<C: Call>(socket: &Path, request: &C) -> Result<C::Answer> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let answer = runtime.block_on(async {
        match tokio::time::timeout(TIMEOUT, exchange(socket, C::METHOD, request.encode_to_vec())).await {
            Ok(answer) => answer,
            Err(_) => bail!("no response within {TIMEOUT:?}"),
        }
    });
    let answer = answer.with_context(|| format!("{} at {}", C::METHOD, socket.display()))?;
    C::Answer::decode(answer).with_context(|| format!("decoding the response of {}", C::METHOD))
}

async fn exchange(socket: &Path, method: &str, message: Vec<u8>) -> Result<Bytes> {
    let stream = UnixStream::connect(socket).await.context("cannot connect")?;
    let (client, connection) = h2::client::handshake(stream).await?;
    // This task ends with the client, or with an error that the client returns too.
    let connection = tokio::spawn(connection);
    let mut client = client.ready().await?;

    let request = Request::post(format!("http://localhost/runtime.v1.{method}"))
        .header("content-type", "application/grpc")
        .header("te", "trailers")
        .body(())?;
    let (response, mut body) = client.send_request(request, false)?;
    let mut frame = BytesMut::with_capacity(PREFIX + message.len());
    frame.put_u8(0);
    frame.put_u32(u32::try_from(message.len())?);
    frame.put_slice(&message);
    body.send_data(frame.freeze(), true)?;

    let (head, mut body) = response.await?.into_parts();
    // A failed call may have its status in the header ("trailers-only").
    ensure_ok(&head.headers)?;
    let mut answer = BytesMut::new();
    while let Some(data) = body.data().await {
        let data = data?;
        body.flow_control().release_capacity(data.len())?;
        answer.extend_from_slice(&data);
    }
    let trailers = poll_fn(|context| body.poll_trailers(context)).await?;
    ensure_ok(&trailers.context("response without trailers")?)?;
    ensure!(answer.len() >= PREFIX, "response of only {} bytes", answer.len());
    connection.abort();
    Ok(answer.freeze().split_off(PREFIX))
}

/// Fails if the gRPC status says that the call failed. Headers without a status pass.
fn ensure_ok(headers: &HeaderMap) -> Result<()> {
    let text = |name| headers.get(name).map(|value| String::from_utf8_lossy(value.as_bytes()).into_owned());
    let status = text("grpc-status").unwrap_or_else(|| "0".to_owned());
    ensure!(status == "0", "gRPC status {status}: {}", text("grpc-message").unwrap_or_default());
    Ok(())
}

/// Implements [`Call`] for each request.
macro_rules! calls {
    ($($request:ident => $answer:ty, $method:literal;)*) => {
        $(impl Call for $request {
            type Answer = $answer;
            const METHOD: &'static str = $method;
        })*
    };
}

calls! {
    RunPodSandbox => SandboxId, "RuntimeService/RunPodSandbox";
    StopPodSandbox => Empty, "RuntimeService/StopPodSandbox";
    RemovePodSandbox => Empty, "RuntimeService/RemovePodSandbox";
    PodSandboxStatus => PodSandboxStatusAnswer, "RuntimeService/PodSandboxStatus";
    ListPodSandbox => Sandboxes, "RuntimeService/ListPodSandbox";
    CreateContainer => ContainerId, "RuntimeService/CreateContainer";
    StartContainer => Empty, "RuntimeService/StartContainer";
    ExecSync => ExecSyncAnswer, "RuntimeService/ExecSync";
    RuntimeStatus => RuntimeStatusAnswer, "RuntimeService/Status";
    ListImages => Images, "ImageService/ListImages";
}

// Field numbers are those of Kubernetes' `runtime.v1`. Fields that the tests do not use are left out.

#[derive(Clone, PartialEq, Message)]
pub(super) struct Empty {}

#[derive(Clone, PartialEq, Message)]
pub(super) struct PodMetadata {
    #[prost(string, tag = "1")]
    pub(super) name: String,
    #[prost(string, tag = "2")]
    pub(super) uid: String,
    #[prost(string, tag = "3")]
    pub(super) namespace: String,
}

/// A port mapping. The protocol field is left at its default, TCP.
#[derive(Clone, PartialEq, Message)]
pub(super) struct PortMapping {
    #[prost(int32, tag = "2")]
    pub(super) container_port: i32,
    #[prost(int32, tag = "3")]
    pub(super) host_port: i32,
}

#[derive(Clone, PartialEq, Message)]
pub(super) struct PodConfig {
    #[prost(message, optional, tag = "1")]
    pub(super) metadata: Option<PodMetadata>,
    #[prost(string, tag = "2")]
    pub(super) hostname: String,
    #[prost(string, tag = "3")]
    pub(super) log_directory: String,
    #[prost(message, repeated, tag = "5")]
    pub(super) port_mappings: Vec<PortMapping>,
    #[prost(btree_map = "string, string", tag = "7")]
    pub(super) annotations: BTreeMap<String, String>,
    #[prost(message, optional, tag = "8")]
    pub(super) linux: Option<Empty>,
}

#[derive(Clone, PartialEq, Message)]
pub(super) struct RunPodSandbox {
    #[prost(message, optional, tag = "1")]
    pub(super) config: Option<PodConfig>,
}

#[derive(Clone, PartialEq, Message)]
pub(super) struct SandboxId {
    #[prost(string, tag = "1")]
    pub(super) id: String,
}

#[derive(Clone, PartialEq, Message)]
pub(super) struct StopPodSandbox {
    #[prost(string, tag = "1")]
    pub(super) id: String,
}

#[derive(Clone, PartialEq, Message)]
pub(super) struct RemovePodSandbox {
    #[prost(string, tag = "1")]
    pub(super) id: String,
}

#[derive(Clone, PartialEq, Message)]
pub(super) struct PodSandboxStatus {
    #[prost(string, tag = "1")]
    pub(super) id: String,
}

#[derive(Clone, PartialEq, Message)]
pub(super) struct PodIp {
    #[prost(string, tag = "1")]
    pub(super) ip: String,
}

#[derive(Clone, PartialEq, Message)]
pub(super) struct PodNetwork {
    #[prost(string, tag = "1")]
    pub(super) ip: String,
    #[prost(message, repeated, tag = "2")]
    pub(super) additional: Vec<PodIp>,
}

#[derive(Clone, PartialEq, Message)]
pub(super) struct PodStatus {
    /// 0 is `SANDBOX_READY`, 1 is `SANDBOX_NOTREADY`.
    #[prost(int32, tag = "3")]
    pub(super) state: i32,
    #[prost(message, optional, tag = "5")]
    pub(super) network: Option<PodNetwork>,
    #[prost(btree_map = "string, string", tag = "8")]
    pub(super) annotations: BTreeMap<String, String>,
}

#[derive(Clone, PartialEq, Message)]
pub(super) struct PodSandboxStatusAnswer {
    #[prost(message, optional, tag = "1")]
    pub(super) status: Option<PodStatus>,
}

#[derive(Clone, PartialEq, Message)]
pub(super) struct ListPodSandbox {}

#[derive(Clone, PartialEq, Message)]
pub(super) struct Sandboxes {
    #[prost(message, repeated, tag = "1")]
    pub(super) items: Vec<SandboxId>,
}

#[derive(Clone, PartialEq, Message)]
pub(super) struct Named {
    #[prost(string, tag = "1")]
    pub(super) name: String,
}

#[derive(Clone, PartialEq, Message)]
pub(super) struct ContainerConfig {
    #[prost(message, optional, tag = "1")]
    pub(super) metadata: Option<Named>,
    #[prost(message, optional, tag = "2")]
    pub(super) image: Option<Named>,
    #[prost(string, tag = "11")]
    pub(super) log_path: String,
    #[prost(message, optional, tag = "15")]
    pub(super) linux: Option<Empty>,
}

#[derive(Clone, PartialEq, Message)]
pub(super) struct CreateContainer {
    #[prost(string, tag = "1")]
    pub(super) pod: String,
    #[prost(message, optional, tag = "2")]
    pub(super) config: Option<ContainerConfig>,
    #[prost(message, optional, tag = "3")]
    pub(super) pod_config: Option<PodConfig>,
}

#[derive(Clone, PartialEq, Message)]
pub(super) struct ContainerId {
    #[prost(string, tag = "1")]
    pub(super) id: String,
}

#[derive(Clone, PartialEq, Message)]
pub(super) struct StartContainer {
    #[prost(string, tag = "1")]
    pub(super) id: String,
}

#[derive(Clone, PartialEq, Message)]
pub(super) struct ExecSync {
    #[prost(string, tag = "1")]
    pub(super) container: String,
    #[prost(string, repeated, tag = "2")]
    pub(super) command: Vec<String>,
    #[prost(int64, tag = "3")]
    pub(super) timeout_seconds: i64,
}

#[derive(Clone, PartialEq, Message)]
pub(super) struct ExecSyncAnswer {
    #[prost(bytes = "vec", tag = "1")]
    pub(super) stdout: Vec<u8>,
    #[prost(bytes = "vec", tag = "2")]
    pub(super) stderr: Vec<u8>,
    #[prost(int32, tag = "3")]
    pub(super) exit_code: i32,
}

#[derive(Clone, PartialEq, Message)]
pub(super) struct RuntimeStatus {}

#[derive(Clone, PartialEq, Message)]
pub(super) struct Condition {
    #[prost(string, tag = "1")]
    pub(super) kind: String,
    #[prost(bool, tag = "2")]
    pub(super) holds: bool,
    #[prost(string, tag = "4")]
    pub(super) message: String,
}

#[derive(Clone, PartialEq, Message)]
pub(super) struct Conditions {
    #[prost(message, repeated, tag = "1")]
    pub(super) conditions: Vec<Condition>,
}

#[derive(Clone, PartialEq, Message)]
pub(super) struct RuntimeStatusAnswer {
    #[prost(message, optional, tag = "1")]
    pub(super) status: Option<Conditions>,
}

#[derive(Clone, PartialEq, Message)]
pub(super) struct ListImages {}

#[derive(Clone, PartialEq, Message)]
pub(super) struct Image {
    #[prost(string, repeated, tag = "2")]
    pub(super) tags: Vec<String>,
}

#[derive(Clone, PartialEq, Message)]
pub(super) struct Images {
    #[prost(message, repeated, tag = "1")]
    pub(super) images: Vec<Image>,
}
