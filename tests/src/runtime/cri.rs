//! A client of the container runtime interface, as the kubelet is one: the few messages that the
//! tests need, and unary gRPC calls over the runtime's socket.

use std::collections::BTreeMap;
use std::future::poll_fn;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use bytes::{BufMut as _, Bytes, BytesMut};
use http::{HeaderMap, Request};
use prost::Message;
use tokio::net::UnixStream;

/// How long a call may take.
const TIMEOUT: Duration = Duration::from_secs(60);

/// What goes before each message: a byte for compression, four for its length.
const PREFIX: usize = 5;

/// A method and its two messages.
pub(super) trait Call: Message {
    /// What it answers.
    type Answer: Message + Default;
    /// Service and method.
    const METHOD: &'static str;
}

/// Calls a method of the runtime that listens there.
pub(super) fn call<C: Call>(socket: &Path, request: &C) -> Result<C::Answer> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let answer = runtime.block_on(async {
        match tokio::time::timeout(TIMEOUT, exchange(socket, C::METHOD, request.encode_to_vec())).await {
            Ok(answer) => answer,
            Err(_) => bail!("no answer in {TIMEOUT:?}"),
        }
    });
    let answer = answer.with_context(|| format!("{} at {}", C::METHOD, socket.display()))?;
    C::Answer::decode(answer).with_context(|| format!("the answer of {}", C::METHOD))
}

async fn exchange(socket: &Path, method: &str, message: Vec<u8>) -> Result<Bytes> {
    let stream = UnixStream::connect(socket).await.context("cannot connect")?;
    let (client, connection) = h2::client::handshake(stream).await?;
    // It ends with the client, or with an error that the client sees too.
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
    // A failed call may have its status where the answer would begin.
    ensure_ok(&head.headers)?;
    let mut answer = BytesMut::new();
    while let Some(data) = body.data().await {
        let data = data?;
        body.flow_control().release_capacity(data.len())?;
        answer.extend_from_slice(&data);
    }
    let trailers = poll_fn(|context| body.poll_trailers(context)).await?;
    ensure_ok(&trailers.context("an answer without a status")?)?;
    ensure!(answer.len() >= PREFIX, "an answer of {} bytes", answer.len());
    connection.abort();
    Ok(answer.freeze().split_off(PREFIX))
}

/// An error unless the call succeeded, or says nothing of that yet.
fn ensure_ok(headers: &HeaderMap) -> Result<()> {
    let text = |name| headers.get(name).map(|value| String::from_utf8_lossy(value.as_bytes()).into_owned());
    let status = text("grpc-status").unwrap_or_else(|| "0".to_owned());
    ensure!(status == "0", "refused (gRPC status {status}): {}", text("grpc-message").unwrap_or_default());
    Ok(())
}

/// Ties a request to its answer and its method.
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

// The fields' numbers are those of Kubernetes' `runtime.v1`. What the tests do not look at is left out.

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

/// The protocol is left at its first value, TCP.
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
    /// 0 is ready, 1 is not.
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
