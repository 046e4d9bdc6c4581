//! The plugin's socket, which the Engine finds, and HTTP on it.

use std::convert::Infallible;
use std::fs::{self, DirBuilder, Permissions};
use std::os::unix::fs::{DirBuilderExt as _, PermissionsExt as _};
use std::os::unix::net::UnixStream as BlockingStream;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use http_body_util::{BodyExt as _, Full, Limited};
use hyper::body::{Bytes, Incoming};
use hyper::header::CONTENT_TYPE;
use hyper::service::service_fn;
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::TokioIo;
use ovl_control::{DockerCall, MAX_REQUEST};
use ovl_runtimes::docker;
use serde_json::Value;
use tokio::net::UnixListener;
use tokio::signal::unix::{SignalKind, signal};

use crate::engine::Engine;
use crate::ovld::Ovld;

/// The content type of plugin calls and responses.
const JSON: &str = "application/vnd.docker.plugins.v1.2+json";
/// The maximum length of a body. The request to ovld that carries it is somewhat longer.
const MAX_BODY: usize = MAX_REQUEST / 2;

/// Serves calls until SIGTERM or SIGINT.
pub(crate) async fn serve(path: &Path, ovld: Ovld, engine: Option<Engine>) -> Result<()> {
    let listener = listen(path)?;
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    loop {
        let stream = tokio::select! {
            accepted = listener.accept() => match accepted {
                Ok((stream, _)) => stream,
                Err(error) => {
                    // The likely cause is a lack of file descriptors, which later closed connections free.
                    eprintln!("ovl-docker: cannot accept a connection: {error}");
                    tokio::time::sleep(Duration::from_millis(100)).await;
                    continue;
                }
            },
            _ = terminate.recv() => break,
            _ = interrupt.recv() => break,
        };
        let (ovld, engine) = (ovld.clone(), engine.clone());
        tokio::spawn(async move {
            let answer = service_fn(|request| answer(request, ovld.clone(), engine.clone()));
            // An error means that the Engine closed the connection, so there is no recipient for it.
            let _ = hyper::server::conn::http1::Builder::new()
                .serve_connection(TokioIo::new(stream), answer)
                .await;
        });
    }
    fs::remove_file(path).with_context(|| format!("cannot remove {}", path.display()))
}

/// Listens on the socket. Replaces a socket that a previous run left, but not one that another process listens on.
fn listen(path: &Path) -> Result<UnixListener> {
    if let Some(dir) = path.parent() {
        DirBuilder::new()
            .recursive(true)
            .mode(0o711)
            .create(dir)
            .with_context(|| format!("cannot create {}", dir.display()))?;
    }
    if path.exists() {
        if BlockingStream::connect(path).is_ok() {
            bail!("another process already listens on {}", path.display());
        }
        fs::remove_file(path).with_context(|| format!("cannot remove {}", path.display()))?;
    }
    let listener =
        UnixListener::bind(path).with_context(|| format!("cannot listen on {}", path.display()))?;
    fs::set_permissions(path, Permissions::from_mode(0o600))
        .with_context(|| format!("cannot set the permissions of {}", path.display()))?;
    Ok(listener)
}

async fn answer(
    request: Request<Incoming>,
    ovld: Ovld,
    engine: Option<Engine>,
) -> Result<Response<Full<Bytes>>, Infallible> {
    let method = request.uri().path().trim_start_matches('/').to_owned();
    let is_post = request.method() == Method::POST;
    let body = match read(request).await {
        Ok(body) if is_post => body,
        Ok(_) => {
            return Ok(response(StatusCode::METHOD_NOT_ALLOWED, &docker::failed("calls are POST requests")));
        }
        Err(why) => return Ok(response(StatusCode::BAD_REQUEST, &docker::failed(&why))),
    };
    let call = DockerCall { method, body };
    let answer = ovld.answer(&call).await;
    if let Some(engine) = engine
        && call.method == "NetworkDriver.Join"
        && answer.get("Err").is_none()
    {
        tokio::spawn(engine.name(ovld, call.body));
    }
    Ok(response(StatusCode::OK, &answer))
}

/// Reads the JSON body regardless of the headers: an Engine sends no content type, and some send an empty host.
async fn read(request: Request<Incoming>) -> Result<Value, String> {
    let body = Limited::new(request.into_body(), MAX_BODY).collect().await;
    let bytes = body.map_err(|error| format!("cannot read the call: {error}"))?.to_bytes();
    if bytes.is_empty() {
        return Ok(Value::Null);
    }
    serde_json::from_slice(&bytes).map_err(|error| format!("the call is not JSON: {error}"))
}

fn response(status: StatusCode, body: &Value) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::new(Bytes::from(body.to_string())));
    *response.status_mut() = status;
    response.headers_mut().insert(CONTENT_TYPE, hyper::header::HeaderValue::from_static(JSON));
    response
}
