//! Keeps a copy of the objects that a selector names: lists them, watches them, and lists them again whenever the watch
//! ends.
//!
//! A watch that has ended, for whatever reason, is not resumed: the list that follows is a full reconciliation and
//! cheap, since it is of one selector in one namespace. So a lost or doubled event is wrong for as long as a watch
//! lasts and no longer, and an expired version (410) is a reason like any other. What is known is replaced by a
//! *successful, complete* list only: errors leave it as it is.
//!
//! A watch ends by itself within [`WATCH_SECONDS`], and is given up when it has been silent for [`SILENCE`]: API
//! servers send a bookmark every minute, so that a connection of which nothing is left but our end is noticed.
//! Attempts are apart by exponential backoff with full jitter, unless what ended had lasted.

use std::collections::BTreeMap;
use std::fmt;
use std::marker::PhantomData;
use std::sync::Arc;
use std::time::Duration;

use futures_util::future::BoxFuture;
use futures_util::stream::BoxStream;
use futures_util::{FutureExt, StreamExt};
use kube::Client;
use kube::core::WatchEvent;
use kube::core::params::{ListParams, WatchParams};
use kube::core::request::Request;
use tokio::time::{Instant, sleep_until, timeout, timeout_at};

use super::resources::{List, Resource};
use crate::discovery::pause::pause;

/// How long a watch is asked to last; up to a tenth more, so that watches that began together do not end together.
const WATCH_SECONDS: u32 = 240;
/// Longest silence of a watch: API servers send bookmarks after 75 s at the latest.
const SILENCE: Duration = Duration::from_secs(90);
/// Longest wait for a page of a list, and for a watch to begin.
const ANSWER: Duration = Duration::from_secs(15);
/// Objects of a page.
const PAGE: u32 = 500;
/// A watch or list that has lasted for so long was no failure.
const LASTED: Duration = Duration::from_secs(10);
/// Bound of the first pause, doubled with each failure in a row.
const FIRST_PAUSE: Duration = Duration::from_millis(500);
/// Greatest bound of a pause.
const GREATEST_PAUSE: Duration = Duration::from_secs(10);

/// Which objects.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Selector {
    pub(super) labels: Option<String>,
    pub(super) fields: Option<String>,
}

/// What has happened to a [`Reflector`]'s copy.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Step {
    /// It has been replaced by a complete list.
    Listed,
    /// An object has come, changed or gone.
    Changed,
    /// It has been confirmed.
    Confirmed,
}

/// Why a list or a watch has come to nothing.
#[derive(Debug, thiserror::Error)]
pub(super) enum Failure {
    #[error("no answer within {ANSWER:?}")]
    NoAnswer,
    #[error("the API server answers {code} ({reason}), expected {what} of {kind}")]
    Refused { code: u16, reason: String, what: &'static str, kind: &'static str },
    #[error("the API server cannot be reached")]
    Unreachable(#[source] kube::Error),
    #[error("the version that the watch began with has expired")]
    Expired,
    #[error("the answer cannot be read: {0}")]
    Unreadable(String),
    #[error("nothing was heard for {SILENCE:?}")]
    Silent,
}

impl Failure {
    /// Name of the kind, for metrics.
    pub(super) fn as_str(&self) -> &'static str {
        match self {
            Self::NoAnswer => "no_answer",
            Self::Refused { code: 401 | 403, .. } => "forbidden",
            Self::Refused { .. } => "refused",
            Self::Unreachable(_) => "unreachable",
            Self::Expired => "expired",
            Self::Unreadable(_) => "unreadable",
            Self::Silent => "silent",
        }
    }
}

type Events<T> = BoxStream<'static, Result<WatchEvent<T>, Failure>>;

/// The objects of a list, and the version that they are of.
type Objects<T> = (BTreeMap<String, T>, String);

/// See the module.
pub(super) struct Reflector<T> {
    source: Arc<Source<T>>,
    objects: BTreeMap<String, T>,
    state: State<T>,
    /// Attempts in a row that did not last.
    n_failures: u32,
}

/// What is under way is kept here, so that whoever stops waiting for it does not stop it.
enum State<T> {
    /// A list, and when it was asked for.
    Listing(BoxFuture<'static, (Result<Objects<T>, Failure>, Instant)>),
    /// A list was complete at this time, and the watch from its version is asked for.
    Opening { events: BoxFuture<'static, Result<Events<T>, Failure>>, since: Instant },
    /// A watch goes on, and was last heard at this time.
    Watching { events: Events<T>, since: Instant, heard: Instant },
}

impl<T: Resource> Reflector<T> {
    pub(super) fn new(client: Client, namespace: &str, selector: Selector) -> Self {
        let request = Request::new(format!("{}/namespaces/{namespace}/{}", T::API, T::PLURAL));
        let source = Arc::new(Source { client, request, selector, kind: PhantomData });
        let state = State::Listing(source.clone().list_at(Instant::now()).boxed());
        Self { source, objects: BTreeMap::new(), state, n_failures: 0 }
    }

    /// The objects, as they were last heard of.
    pub(super) fn objects(&self) -> impl Iterator<Item = &T> {
        self.objects.values()
    }

    /// Goes on until something has happened. May be dropped at any time, and then goes on where it was.
    pub(super) async fn next(&mut self) -> Result<Step, Failure> {
        match &mut self.state {
            State::Listing(list) => {
                let (listed, began) = list.await;
                self.listed(listed, began)
            }
            State::Opening { events, since } => {
                let since = *since;
                let opened = events.await;
                self.opened(opened, since)
            }
            State::Watching { events, since, heard } => {
                let since = *since;
                // Not from now on: whoever waits for several watches asks again whenever another one speaks.
                let event = timeout_at(*heard + SILENCE, events.next()).await;
                *heard = Instant::now();
                self.heard(event.map_err(|_| Failure::Silent), since)
            }
        }
    }

    fn listed(&mut self, listed: Result<Objects<T>, Failure>, began: Instant) -> Result<Step, Failure> {
        match listed {
            Ok((objects, version)) => {
                self.objects = objects;
                let events = self.source.clone().watch(version).boxed();
                self.state = State::Opening { events, since: Instant::now() };
                Ok(Step::Listed)
            }
            Err(failure) => {
                self.ended(began);
                Err(failure)
            }
        }
    }

    fn opened(&mut self, opened: Result<Events<T>, Failure>, since: Instant) -> Result<Step, Failure> {
        match opened {
            Ok(events) => {
                self.state = State::Watching { events, since, heard: Instant::now() };
                Ok(Step::Confirmed)
            }
            Err(failure) => {
                self.ended(since);
                Err(failure)
            }
        }
    }

    fn heard(
        &mut self,
        event: Result<Option<Result<WatchEvent<T>, Failure>>, Failure>,
        since: Instant,
    ) -> Result<Step, Failure> {
        let step = event.and_then(|event| match event {
            Some(event) => self.apply(event?).map(Some),
            // The server has ended it, as it was asked to.
            None => Ok(None),
        });
        if !matches!(step, Ok(Some(_))) {
            self.ended(since);
        }
        Ok(step?.unwrap_or(Step::Confirmed))
    }

    fn apply(&mut self, event: WatchEvent<T>) -> Result<Step, Failure> {
        match event {
            WatchEvent::Added(object) | WatchEvent::Modified(object) => {
                self.objects.insert(object.metadata().name.clone(), object);
                Ok(Step::Changed)
            }
            WatchEvent::Deleted(object) => {
                self.objects.remove(&object.metadata().name);
                Ok(Step::Changed)
            }
            WatchEvent::Bookmark(_) => Ok(Step::Confirmed),
            WatchEvent::Error(status) => Err(failure::<T>("a watch", kube::Error::Api(status))),
        }
    }

    /// Notes the end of what began at `since`, and when to list again.
    fn ended(&mut self, since: Instant) {
        let now = Instant::now();
        let has_lasted = now.duration_since(since) >= LASTED;
        self.n_failures = if has_lasted { 0 } else { self.n_failures.saturating_add(1) };
        let due = now + pause(self.n_failures, FIRST_PAUSE, GREATEST_PAUSE, fastrand::f64());
        self.state = State::Listing(self.source.clone().list_at(due).boxed());
    }
}

/// Where the objects are, and which.
struct Source<T> {
    client: Client,
    request: Request,
    selector: Selector,
    kind: PhantomData<fn() -> T>,
}

impl<T: Resource> Source<T> {
    /// Lists at a time that may be still to come, and says when that was.
    async fn list_at(self: Arc<Self>, due: Instant) -> (Result<Objects<T>, Failure>, Instant) {
        sleep_until(due).await;
        let began = Instant::now();
        (self.list().await, began)
    }

    async fn list(&self) -> Result<Objects<T>, Failure> {
        let mut objects = BTreeMap::new();
        let mut params = ListParams {
            label_selector: self.selector.labels.clone(),
            field_selector: self.selector.fields.clone(),
            limit: Some(PAGE),
            ..ListParams::default()
        };
        loop {
            let page = self.page(&params).await?;
            let names = page.items.into_iter().flatten().map(|object: T| (object.metadata().name.clone(), object));
            objects.extend(names);
            match page.metadata.next_page.filter(|token| !token.is_empty()) {
                Some(token) => params.continue_token = Some(token),
                None => return Ok((objects, page.metadata.resource_version)),
            }
        }
    }

    async fn page(&self, params: &ListParams) -> Result<List<T>, Failure> {
        let request = self.request.list(params).map_err(|error| Failure::Unreadable(error.to_string()))?;
        let answer = timeout(ANSWER, self.client.request_text(request)).await.map_err(|_| Failure::NoAnswer)?;
        let text = answer.map_err(|error| failure::<T>("a list", error))?;
        // Read here and not by the client, which logs what it cannot read: pods may hold secrets.
        serde_json::from_str(&text).map_err(|error| unreadable(&error))
    }

    async fn watch(self: Arc<Self>, version: String) -> Result<Events<T>, Failure> {
        let params = WatchParams {
            label_selector: self.selector.labels.clone(),
            field_selector: self.selector.fields.clone(),
            timeout: Some(WATCH_SECONDS + fastrand::u32(..WATCH_SECONDS / 10)),
            bookmarks: true,
            ..WatchParams::default()
        };
        let request = self.request.watch(&params, &version).map_err(|error| Failure::Unreadable(error.to_string()))?;
        let opened = timeout(ANSWER, self.client.request_events::<T>(request)).await.map_err(|_| Failure::NoAnswer)?;
        let events = opened.map_err(|error| failure::<T>("a watch", error))?;
        Ok(events.map(|event| event.map_err(|error| failure::<T>("a watch", error))).boxed())
    }
}

fn failure<T: Resource>(what: &'static str, error: kube::Error) -> Failure {
    match error {
        kube::Error::Api(status) if status.code == 410 => Failure::Expired,
        // Any mapping can be read as a status.
        kube::Error::Api(status) if status.code == 0 => Failure::Unreadable("neither an event nor a status".to_owned()),
        kube::Error::Api(status) => {
            Failure::Refused { code: status.code, reason: status.reason.clone(), what, kind: T::PLURAL }
        }
        kube::Error::SerdeError(error) => unreadable(&error),
        error => Failure::Unreachable(error),
    }
}

/// Where it could not be read, and not what is there.
fn unreadable(error: &serde_json::Error) -> Failure {
    Failure::Unreadable(format!("{:?} error in line {}, column {}", error.classify(), error.line(), error.column()))
}

impl<T> fmt::Debug for Reflector<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { source, objects, n_failures, .. } = self;
        f.debug_struct("Reflector")
            .field("path", &source.request.url_path)
            .field("selector", &source.selector)
            .field("n_objects", &objects.len())
            .field("n_failures", n_failures)
            .finish_non_exhaustive()
    }
}
