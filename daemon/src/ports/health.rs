//! Health checks of Services (`healthCheckNodePort`): tells load balancers over HTTP how many backends of a
//! Service are on this host. The reply is that of kube-proxy, for clients that read more than the status.

use std::cell::RefCell;
use std::io;
use std::rc::Rc;
use std::time::Duration;

use serde_json::json;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};

/// Time limit of one request and its reply.
const PATIENCE: Duration = Duration::from_secs(5);
/// Pause after an error that persists for a while, such as no memory or too many open files.
const PAUSE: Duration = Duration::from_millis(200);
/// Maximum number of requests in flight at a port. Further clients wait.
const MOST: usize = 64;
/// Maximum length of a request in bytes.
const REQUEST: usize = 4096;

/// The reply to health checks at a port.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Answer {
    /// Namespace of the Service.
    pub(crate) namespace: String,
    /// Name of the Service.
    pub(crate) name: String,
    /// Number of backends on this host that accept connections.
    pub(crate) local: usize,
}

impl Answer {
    fn http(&self) -> String {
        let status = if self.local > 0 { "200 OK" } else { "503 Service Unavailable" };
        let body = json!({
            "service": { "namespace": self.namespace, "name": self.name },
            "localEndpoints": self.local,
            "serviceProxyHealthy": true,
        })
        .to_string();
        format!(
            "HTTP/1.1 {status}\r\nContent-Type: application/json\r\nX-Content-Type-Options: nosniff\r\n\
             X-Load-Balancing-Endpoint-Weight: {}\r\nContent-Length: {}\r\nConnection: close\r\n\r\n{body}",
            self.local,
            body.len()
        )
    }
}

/// Answers health checks forever.
pub(super) async fn serve(listener: std::net::TcpListener, answer: Rc<RefCell<Answer>>) {
    let listener = match TcpListener::from_std(listener) {
        Ok(listener) => listener,
        Err(error) => return tracing::error!(%error, "cannot serve a port for health checks"),
    };
    let mut asking = JoinSet::new();
    loop {
        while asking.try_join_next().is_some() {}
        if asking.len() >= MOST {
            asking.join_next().await;
        }
        match listener.accept().await {
            // A client that takes longer than the limit gets no answer.
            Ok((stream, _)) => drop(asking.spawn_local(timeout(PATIENCE, one(stream, Rc::clone(&answer))))),
            Err(error) => {
                tracing::debug!(%error, "no health check can be taken");
                sleep(PAUSE).await;
            }
        }
    }
}

async fn one(mut stream: TcpStream, answer: Rc<RefCell<Answer>>) -> io::Result<()> {
    let (mut request, mut part) = (Vec::new(), [0; 512]);
    while !request.windows(4).any(|end| end == b"\r\n\r\n") {
        let length = stream.read(&mut part).await?;
        if length == 0 || request.len() + length > REQUEST {
            return Ok(());
        }
        request.extend_from_slice(part.get(..length).unwrap_or_default());
    }
    let text = answer.borrow().http();
    let text = match text.split_once("\r\n\r\n") {
        Some((head, _)) if request.starts_with(b"HEAD ") => format!("{head}\r\n\r\n"),
        _ => text,
    };
    stream.write_all(text.as_bytes()).await?;
    stream.shutdown().await
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_answer_is_kube_proxys() {
        let mut answer = Answer { namespace: "shop".to_owned(), name: "web".to_owned(), local: 2 };
        let text = answer.http();
        let (head, body) = text.split_once("\r\n\r\n").unwrap();
        assert!(head.starts_with("HTTP/1.1 200 OK\r\n"), "{head}");
        assert!(head.contains(&format!("\r\nContent-Length: {}\r\n", body.len())), "{head}");
        let body: serde_json::Value = serde_json::from_str(body).unwrap();
        assert_eq!(body["service"], json!({ "namespace": "shop", "name": "web" }));
        assert_eq!(body["localEndpoints"], 2);
        answer.local = 0;
        assert!(answer.http().starts_with("HTTP/1.1 503 "));
    }
}
