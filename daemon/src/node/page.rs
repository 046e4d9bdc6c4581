//! Serves the page to browsers, if `ui_listen` is set. [`crate::page`] says what a request asks for, and who may ask.

use std::rc::Rc;
use std::time::Duration;

use http_body_util::channel::{Channel, Sender};
use hyper::StatusCode;
use hyper::body::Bytes;
use ovl_control::{FlowsOf, PageAddress};
use serde::Serialize;
use tokio::sync::broadcast;
use tokio::sync::broadcast::error::RecvError;
use tokio::time::{Instant, MissedTickBehavior};

use super::{Failed, Node};
use crate::page::{HEADERS, Token, Wanted, wanted};
use crate::problems::Code;
use crate::slots::ClientSlots;
use crate::web::{self, Answer, Asked, Listen, Pages};

/// Maximum number of event streams at a time. Further ones are refused, and the page tries again.
const MAX_STREAMS: usize = 16;
/// Interval of the reports in an event stream.
const INTERVAL: Duration = Duration::from_secs(2);
/// How long a document is given again, so that many clients cost no more than one.
const FRESH: Duration = Duration::from_secs(1);
/// How many events of a stream wait for its client.
const WAITING: usize = 4;
/// The maximum number of flows of a host in an event.
const MOST_FLOWS: usize = 200;
/// How many events with flows wait for a client. One that is further behind misses some.
const WAITING_FLOWS: usize = 16;
/// Time until the next attempt to listen.
const RETRY: Duration = Duration::from_secs(5);

impl Node {
    /// Returns where the page is.
    pub(super) fn page_address(&self) -> Result<PageAddress, Failed> {
        match (&self.config.ui_listen, &*self.page_token.borrow()) {
            (None, _) => {
                Err(Failed::unavailable("no page is served: set ui_listen in ovld.toml, and restart ovld"))
            }
            (Some(Listen::Unix(path)), _) => Ok(PageAddress::Unix(path.clone())),
            (Some(Listen::Tcp(address)), Some(token)) => Ok(PageAddress::Url(token.url(address))),
            (Some(Listen::Tcp(_)), None) => {
                Err(Failed::unavailable("the page is not served yet: `ovlctl status` says why"))
            }
        }
    }

    /// Serves the page forever, if it is configured.
    pub(super) async fn page_loop(self: Rc<Self>) {
        let Some(listen) = self.config.ui_listen.clone() else { return std::future::pending().await };
        loop {
            let opened = || self.state.borrow_mut().problems.set(Code::PageAddress, "", None);
            let served = match self.load_token() {
                Ok(token) => {
                    let server = Server {
                        node: Rc::clone(&self),
                        token,
                        streams: ClientSlots::new(MAX_STREAMS),
                        overview: Kept::default(),
                        reports: Kept::default(),
                        flows: tokio::sync::Mutex::default(),
                    };
                    web::serve(Rc::new(server), &listen, opened).await
                }
                Err(error) => Err(error),
            };
            if let Err(error) = served {
                let sentence = format!(
                    "the page is not served at {listen}: {error}. Free it, or change ui_listen in ovld.toml; ovld tries \
                     again every {} s",
                    RETRY.as_secs()
                );
                self.state.borrow_mut().problems.set(Code::PageAddress, "", Some(sentence));
            }
            tokio::time::sleep(RETRY).await;
        }
    }

    fn load_token(&self) -> std::io::Result<Option<Rc<Token>>> {
        let file = self.config.ui_token_file.as_deref();
        let token = file.map(|path| Token::load(path, self.random())).transpose()?.map(Rc::new);
        self.page_token.borrow_mut().clone_from(&token);
        Ok(token)
    }
}

/// A document in JSON, with the time when it was made, and the version of what it shows.
type Kept = tokio::sync::Mutex<Option<(Instant, u64, Bytes)>>;

/// The server of the page.
struct Server {
    node: Rc<Node>,
    /// What a client must send. `None`: nothing.
    token: Option<Rc<Token>>,
    /// Slots for event streams.
    streams: ClientSlots,
    /// The last overview.
    overview: Kept,
    /// The last reports.
    reports: Kept,
    /// The flows of all hosts, once for all clients that watch them. `None`: no client did yet.
    flows: tokio::sync::Mutex<Option<broadcast::WeakSender<Bytes>>>,
}

impl Server {
    /// Returns an overview, and the version that it shows at least.
    async fn overview(&self) -> Result<(u64, Bytes), Failed> {
        // What changes while it is made has another version, so it is not taken for shown.
        fresh(&self.overview, self.node.overview_version(), async || self.node.overview().await).await
    }

    async fn reports(&self) -> Result<Bytes, Failed> {
        fresh(&self.reports, 0, async || self.node.reports().await).await.map(|(_, reports)| reports)
    }

    /// Opens an event stream. `feed` writes to it, until its client is gone.
    fn stream(self: &Rc<Self>, feed: impl AsyncFnOnce(Rc<Self>, Sender<Bytes>) + 'static) -> Answer {
        let Some(slot) = self.streams.take() else {
            let sentence = "too many pages are open: close one, or wait";
            return Answer::other(StatusCode::SERVICE_UNAVAILABLE, sentence);
        };
        let (sender, channel) = Channel::new(WAITING);
        let server = Rc::clone(self);
        tokio::task::spawn_local(async move {
            feed(server, sender).await;
            drop(slot);
        });
        Answer::events(channel)
    }

    /// Opens an event stream of the flows of all hosts.
    async fn flows_stream(self: &Rc<Self>) -> Answer {
        match self.follow_flows().await {
            Ok(flows) => self.stream(async move |_, sender| feed_flows(flows, sender).await),
            Err(Failed(failure)) => Answer::other(StatusCode::SERVICE_UNAVAILABLE, &failure.message),
        }
    }

    /// Returns where the flows of all hosts are told. They are followed as long as a client is there.
    async fn follow_flows(&self) -> Result<broadcast::Receiver<Bytes>, Failed> {
        let mut kept = self.flows.lock().await;
        // The sender ends with the task that feeds it, and that with the last receiver.
        if let Some(tell) = kept.as_ref().and_then(broadcast::WeakSender::upgrade)
            && tell.receiver_count() > 0
        {
            return Ok(tell.subscribe());
        }
        let mut seen = self.node.follow_flows(FlowsOf::All, MOST_FLOWS).await?;
        let (tell, told) = broadcast::channel(WAITING_FLOWS);
        *kept = Some(tell.downgrade());
        tokio::task::spawn_local(async move {
            while let Some(flows) = seen.recv().await {
                // An error says that no client is left.
                if json(&flows).is_ok_and(|flows| tell.send(flows).is_err()) {
                    return;
                }
            }
        });
        Ok(told)
    }

    /// Writes what happens to an event stream, until its client is gone.
    async fn feed(self: Rc<Self>, mut sender: Sender<Bytes>) {
        let (_, mut live) = self.node.events.follow();
        let mut ticks = tokio::time::interval(INTERVAL);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut told = None;
        loop {
            let sent = tokio::select! {
                _ = ticks.tick() => self.tick(&mut told, &mut sender).await,
                event = live.recv() => match event {
                    Ok(event) => match json(&event) {
                        Ok(event) => send(&mut sender, "event", &event).await,
                        Err(_) => Ok(()),
                    },
                    // A client that reads too slowly misses events.
                    Err(RecvError::Lagged(_)) => Ok(()),
                    Err(RecvError::Closed) => Err(Gone),
                },
            };
            if sent.is_err() {
                return;
            }
        }
    }

    /// Sends the overview if it has changed, and the reports. `told` is the version of the overview that was sent last.
    async fn tick(&self, told: &mut Option<u64>, sender: &mut Sender<Bytes>) -> Result<(), Gone> {
        if *told != Some(self.node.overview_version())
            && let Ok((version, overview)) = self.overview().await
            && *told != Some(version)
        {
            *told = Some(version);
            send(sender, "overview", &overview).await?;
        }
        match self.reports().await {
            Ok(reports) => send(sender, "reports", &reports).await,
            Err(_) => Ok(()),
        }
    }
}

/// The client of an event stream is gone.
struct Gone;

async fn send(sender: &mut Sender<Bytes>, kind: &str, json: &Bytes) -> Result<(), Gone> {
    let event = [b"event: ", kind.as_bytes(), b"\ndata: ", json, b"\n\n"].concat();
    sender.send_data(Bytes::from(event)).await.map_err(|_| Gone)
}

/// Writes flows to an event stream, until its client is gone. An event of this host comes each second, so that is noticed.
async fn feed_flows(mut flows: broadcast::Receiver<Bytes>, mut sender: Sender<Bytes>) {
    loop {
        let sent = match flows.recv().await {
            Ok(flows) => send(&mut sender, "flows", &flows).await,
            // A client that reads too slowly misses some.
            Err(RecvError::Lagged(_)) => Ok(()),
            Err(RecvError::Closed) => return,
        };
        if sent.is_err() {
            return;
        }
    }
}

/// Returns a document that is not old with its version, or makes it with this version.
async fn fresh<T: Serialize>(
    kept: &Kept,
    version: u64,
    make: impl AsyncFnOnce() -> T,
) -> Result<(u64, Bytes), Failed> {
    let mut kept = kept.lock().await;
    match &*kept {
        Some((at, version, document)) if at.elapsed() < FRESH => Ok((*version, document.clone())),
        _ => {
            let document = json(&make().await)?;
            *kept = Some((Instant::now(), version, document.clone()));
            Ok((version, document))
        }
    }
}

fn json(value: &impl Serialize) -> Result<Bytes, Failed> {
    serde_json::to_vec(value).map(Bytes::from).map_err(|error| Failed::internal(error.to_string()))
}

/// Answers with a document, or says why it cannot be made.
fn document(json: Result<Bytes, Failed>, failed: StatusCode) -> Answer {
    match json {
        Ok(json) => Answer::document("application/json", json),
        Err(Failed(failure)) => Answer::other(failed, &failure.message),
    }
}

impl Pages for Server {
    const HEADERS: &'static [(&'static str, &'static str)] = HEADERS;

    async fn answer(self: &Rc<Self>, asked: &Asked<'_>) -> Answer {
        let unavailable = StatusCode::SERVICE_UNAVAILABLE;
        match wanted(asked, self.token.as_deref()) {
            Ok(Wanted::File { content_type, content }) => Answer::document(content_type, content),
            Ok(Wanted::Overview) => {
                document(self.overview().await.map(|(_, overview)| overview), unavailable)
            }
            Ok(Wanted::Reports) => document(self.reports().await, unavailable),
            Ok(Wanted::Events(period)) => document(json(&self.node.events.of(period).await), unavailable),
            Ok(Wanted::Drops) => {
                document(self.node.policy_drops().await.and_then(|drops| json(&drops)), unavailable)
            }
            Ok(Wanted::Policy { from, to, port }) => {
                let verdicts = self.node.policy_explain(&from, &to, port);
                document(verdicts.and_then(|verdicts| json(&verdicts)), StatusCode::BAD_REQUEST)
            }
            Ok(Wanted::Stream) => self.stream(Self::feed),
            Ok(Wanted::Flows) => self.flows_stream().await,
            Err((status, sentence)) => Answer::other(status, &sentence),
        }
    }
}
