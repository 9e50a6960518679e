//! A Kubernetes API server that lists and watches, and fails in the ways that the real one does.

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::io;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use axum::body::{Body, Bytes};
use axum::http::{Method, Request, Response, Uri};
use serde_json::{Value, json};
use tokio::net::TcpListener;
use tokio::sync::mpsc;
use tokio_stream::wrappers::UnboundedReceiverStream;
use tower::BoxError;

pub(crate) const PODS: &str = "/api/v1/namespaces/models/pods";
pub(crate) const SLICES: &str = "/apis/discovery.k8s.io/v1/namespaces/models/endpointslices";
pub(crate) const POOLS: &str = "/apis/inference.networking.k8s.io/v1/namespaces/models/inferencepools";

/// How the server answers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Mood {
    Well,
    /// Nobody is there.
    Down,
    /// Every question is refused with this status.
    Refuses(u16),
    /// It takes questions and never answers.
    Hangs,
    /// It answers lists with this.
    Babbles(&'static str),
}

#[derive(Clone, Default)]
pub(crate) struct FakeApi(Arc<Mutex<State>>);

struct State {
    version: u64,
    /// Watches from before this version are refused.
    compacted: u64,
    objects: BTreeMap<(String, String), Value>,
    history: Vec<Change>,
    watches: Vec<Watch>,
    mood: Mood,
    /// How long each answer takes.
    delay: Duration,
    page: usize,
    asked: Vec<String>,
}

/// An object before and after.
#[derive(Clone)]
struct Change {
    version: u64,
    path: String,
    before: Option<Value>,
    after: Option<Value>,
}

struct Watch {
    question: Question,
    events: mpsc::UnboundedSender<Result<Bytes, io::Error>>,
}

#[derive(Clone, Default)]
struct Question {
    path: String,
    labels: Vec<(String, String)>,
    name: Option<String>,
    watch: bool,
    version: u64,
    offset: usize,
}

impl Default for State {
    fn default() -> Self {
        Self {
            version: 1,
            compacted: 0,
            objects: BTreeMap::new(),
            history: Vec::new(),
            watches: Vec::new(),
            mood: Mood::Well,
            delay: Duration::ZERO,
            page: 500,
            asked: Vec::new(),
        }
    }
}

impl Question {
    fn parse(uri: &Uri) -> Self {
        let mut question = Self { path: uri.path().to_owned(), ..Self::default() };
        let query = uri.query().unwrap_or_default();
        for (key, value) in query.split('&').filter_map(|pair| pair.split_once('=')) {
            let value = unescaped(value);
            match key {
                "labelSelector" => {
                    let pair = |label: &str| label.split_once('=').map(|(k, v)| (k.to_owned(), v.to_owned()));
                    question.labels = value.split(',').filter_map(pair).collect();
                }
                "fieldSelector" => question.name = value.strip_prefix("metadata.name=").map(str::to_owned),
                "watch" => question.watch = value == "true",
                "resourceVersion" => question.version = value.parse().unwrap(),
                "continue" => question.offset = value.parse().unwrap(),
                _ => {}
            }
        }
        question
    }

    fn wants(&self, path: &str, object: &Value) -> bool {
        let label = |(key, value): &(String, String)| object["metadata"]["labels"][key].as_str() == Some(value);
        let is_named = self.name.as_deref().is_none_or(|name| object["metadata"]["name"] == name);
        self.path == path && is_named && self.labels.iter().all(label)
    }

    fn event(&self, change: &Change) -> Option<Bytes> {
        let wants = |object: &Option<Value>| object.as_ref().is_some_and(|object| self.wants(&change.path, object));
        let (kind, object) = match (wants(&change.before), wants(&change.after)) {
            (false, true) => ("ADDED", &change.after),
            (true, true) => ("MODIFIED", &change.after),
            (true, false) => ("DELETED", &change.before),
            (false, false) => return None,
        };
        Some(line(&json!({ "type": kind, "object": object })))
    }
}

fn unescaped(text: &str) -> String {
    let mut bytes = Vec::new();
    let mut rest = text.as_bytes();
    while let Some((first, after)) = rest.split_first() {
        (bytes, rest) = match first {
            b'%' => {
                let byte = u8::from_str_radix(std::str::from_utf8(&after[..2]).unwrap(), 16).unwrap();
                ([bytes, vec![byte]].concat(), &after[2..])
            }
            b'+' => ([bytes, vec![b' ']].concat(), after),
            other => ([bytes, vec![*other]].concat(), after),
        };
    }
    String::from_utf8(bytes).unwrap()
}

fn line(event: &Value) -> Bytes {
    format!("{event}\n").into()
}

fn expired() -> Value {
    json!({ "kind": "Status", "status": "Failure", "message": "too old resource version", "reason": "Expired", "code": 410 })
}

impl FakeApi {
    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap()
    }

    /// Creates or replaces an object.
    pub(crate) fn put(&self, path: &str, object: &Value) {
        let name = object["metadata"]["name"].as_str().unwrap().to_owned();
        self.change(path, name, Some(object.clone()));
    }

    pub(crate) fn delete(&self, path: &str, name: &str) {
        self.change(path, name.to_owned(), None);
    }

    fn change(&self, path: &str, name: String, mut after: Option<Value>) {
        let mut state = self.state();
        state.version += 1;
        let version = state.version;
        if let Some(object) = &mut after {
            object["metadata"]["resourceVersion"] = version.to_string().into();
        }
        let key = (path.to_owned(), name);
        let before = match &after {
            Some(object) => state.objects.insert(key, object.clone()),
            None => state.objects.remove(&key),
        };
        let change = Change { version, path: path.to_owned(), before, after };
        state.watches.retain(|watch| {
            let event = watch.question.event(&change);
            event.is_none_or(|event| watch.events.send(Ok(event)).is_ok())
        });
        state.history.push(change);
    }

    pub(crate) fn set(&self, mood: Mood) {
        self.state().mood = mood;
    }

    pub(crate) fn set_delay(&self, delay: Duration) {
        self.state().delay = delay;
    }

    pub(crate) fn set_page(&self, page: usize) {
        self.state().page = page;
    }

    /// Forgets all versions before this one.
    pub(crate) fn compact(&self) {
        let mut state = self.state();
        state.compacted = state.version;
    }

    /// Breaks the connections of all watches.
    pub(crate) fn drop_watches(&self) {
        for watch in self.state().watches.drain(..) {
            let _ = watch.events.send(Err(io::Error::new(io::ErrorKind::ConnectionReset, "reset by the test")));
        }
    }

    /// Ends all watches as a server does that has been asked to.
    pub(crate) fn end_watches(&self) {
        self.state().watches.clear();
    }

    /// Writes something to all watches.
    pub(crate) fn say(&self, event: &str) {
        let event = Bytes::from(format!("{event}\n"));
        self.state().watches.retain(|watch| watch.events.send(Ok(event.clone())).is_ok());
    }

    /// Has all watches say nothing any more, without an end. What is returned keeps them open.
    pub(crate) fn mute_watches(&self) -> Muted {
        Muted { _watches: self.state().watches.drain(..).collect() }
    }

    pub(crate) fn n_watches(&self) -> usize {
        let mut state = self.state();
        state.watches.retain(|watch| !watch.events.is_closed());
        state.watches.len()
    }

    /// Method, path and query of every question.
    pub(crate) fn asked(&self) -> Vec<String> {
        self.state().asked.clone()
    }

    async fn answer(self, method: Method, uri: Uri) -> Result<Response<Body>, BoxError> {
        let (mood, delay) = {
            let mut state = self.state();
            state.asked.push(format!("{method} {uri}"));
            (state.mood, state.delay)
        };
        tokio::time::sleep(delay).await;
        match mood {
            Mood::Well => Ok(self.answer_well(&Question::parse(&uri))),
            Mood::Down => Err("nobody listens".into()),
            Mood::Refuses(status) => {
                let body = json!({ "kind": "Status", "status": "Failure", "reason": "Refused", "code": status });
                Ok(response(status, body.to_string()))
            }
            Mood::Hangs => std::future::pending().await,
            Mood::Babbles(text) => Ok(response(200, text)),
        }
    }

    fn answer_well(&self, question: &Question) -> Response<Body> {
        let mut state = self.state();
        if !question.watch {
            return response(200, state.list(question).to_string());
        }
        if question.version < state.compacted {
            return response(200, line(&json!({ "type": "ERROR", "object": expired() })));
        }
        let (events, receiver) = mpsc::unbounded_channel();
        for change in state.history.iter().filter(|change| change.version > question.version) {
            question.event(change).map(|event| events.send(Ok(event)));
        }
        state.watches.push(Watch { question: question.clone(), events });
        response(200, Body::from_stream(UnboundedReceiverStream::new(receiver)))
    }

    /// A client that has no socket between itself and the server, and hence can be tested with a paused clock.
    pub(crate) fn client(&self) -> kube::Client {
        let api = self.clone();
        let service = tower::service_fn(move |request: Request<kube::client::Body>| {
            let api = api.clone();
            async move { api.answer(request.method().clone(), request.uri().clone()).await }
        });
        kube::Client::new(service, "models")
    }

    /// Serves on a real port: `address`, or any.
    pub(crate) async fn serve(&self, address: SocketAddr) -> SocketAddr {
        let listener = TcpListener::bind(address).await.unwrap();
        let address = listener.local_addr().unwrap();
        let api = self.clone();
        let app = axum::Router::new().fallback(move |method: Method, uri: Uri| {
            let api = api.clone();
            async move { Ok::<_, Infallible>(api.answer(method, uri).await.unwrap_or_else(|_| response(503, ""))) }
        });
        tokio::spawn(async move { axum::serve(listener, app).await });
        address
    }
}

impl State {
    fn list(&self, question: &Question) -> Value {
        let wanted = self.objects.iter().filter(|((path, _), object)| question.wants(path, object));
        let wanted: Vec<&Value> = wanted.map(|(_, object)| object).collect();
        let end = (question.offset + self.page).min(wanted.len());
        let next = if end < wanted.len() { end.to_string() } else { String::new() };
        json!({
            "kind": "List",
            "metadata": { "resourceVersion": self.version.to_string(), "continue": next },
            "items": wanted[question.offset..end],
        })
    }
}

/// Watches that say nothing.
pub(crate) struct Muted {
    _watches: Vec<Watch>,
}

fn response(status: u16, body: impl Into<Body>) -> Response<Body> {
    Response::builder().status(status).header("content-type", "application/json").body(body.into()).unwrap()
}
