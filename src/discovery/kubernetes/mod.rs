//! Endpoints from the Kubernetes API: pods by label, the EndpointSlices of a Service, or the pods of an InferencePool.
//!
//! Reads only, in one namespace, and only what it uses: `list` and `watch` of pods, or of EndpointSlices, or of pods and
//! InferencePools. Each pool of endpoints has a watch of its own: pools select different pods, so there is nothing to
//! share, and none waits for another.
//!
//! `reflect` keeps a copy of the objects, `pods` and `slices` say which endpoints they are; each change of the
//! copy is handed over as a full listing. An API server that cannot be reached changes nothing.

mod client;
mod pods;
mod reflect;
mod resources;
mod slices;

use std::collections::HashSet;
use std::convert::Infallible;

use kube::Client;
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

pub use client::{ClientError, client, infer_client};
use pods::Wrong;
pub use pods::{PodRules, Publishing};
use reflect::{Failure, Reflector, Selector, Step};
use resources::{EndpointSlice, InferencePool, InferencePoolSpec, Pod};
pub use slices::SliceRules;

use super::outage::Outage;
use super::{OnUpdate, Update};

/// Where a pool's endpoints are found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Query {
    /// Pods by a label selector.
    Pods {
        /// As `kubectl get pods -l` takes it.
        selector: String,
        /// How they are read.
        rules: PodRules,
    },
    /// The EndpointSlices of a Service.
    Service {
        /// Its name.
        name: String,
        /// How they are read.
        rules: SliceRules,
    },
    /// The pods of an InferencePool (`inference.networking.k8s.io/v1`).
    InferencePool {
        /// Its name.
        name: String,
        /// How the pods are read.
        rules: PodRules,
    },
}

/// The background task of one pool.
pub struct Kubernetes {
    /// The way to the API server.
    pub client: Client,
    /// Namespace; none: that of the credentials.
    pub namespace: Option<String>,
    /// Where the endpoints are found.
    pub query: Query,
    /// Takes the listings.
    pub on_update: OnUpdate,
    /// The model, for the log.
    pub model: std::sync::Arc<str>,
}

impl Kubernetes {
    /// Lists and watches until `shutdown`.
    ///
    /// # Errors
    /// None.
    pub async fn run(self, shutdown: CancellationToken) -> Result<(), Infallible> {
        let namespace = self.namespace.clone().unwrap_or_else(|| self.client.default_namespace().to_owned());
        let query = self.query.clone();
        let outages = [Outage::new(self.model.clone()), Outage::new(self.model.clone())];
        let [outage, pool_outage] = outages;
        let mut follower = Follower { namespace, outage, pool_outage, warned: HashSet::new(), task: self };
        let following = async {
            match query {
                Query::Pods { selector, rules } => follower.pods(selector, &rules).await,
                Query::Service { name, rules } => follower.service(&name, rules).await,
                Query::InferencePool { name, rules } => follower.inference_pool(&name, &rules).await,
            }
        };
        shutdown.run_until_cancelled(following).await;
        Ok(())
    }
}

struct Follower {
    task: Kubernetes,
    namespace: String,
    /// Of what is listed as endpoints.
    outage: Outage,
    /// Of the InferencePool that says which pods those are.
    pool_outage: Outage,
    /// What is wrong in the pods and has been in the log.
    warned: HashSet<Wrong>,
}

impl Follower {
    async fn pods(&mut self, selector: String, rules: &PodRules) -> Infallible {
        let mut pods = self.reflector::<Pod>(Selector { labels: Some(selector), fields: None });
        loop {
            let step = pods.next().await;
            self.pods_stepped(step, &pods, rules, &[]);
        }
    }

    async fn service(&mut self, name: &str, rules: SliceRules) -> Infallible {
        let labels = Some(format!("kubernetes.io/service-name={name}"));
        let mut slices = self.reflector::<EndpointSlice>(Selector { labels, fields: None });
        loop {
            let step = slices.next().await;
            if self.is_news(step) {
                self.tell(Update::Listed(slices::endpoints(slices.objects(), rules)));
            }
        }
    }

    /// Follows the pods that an InferencePool selects, and the pool itself. A pool that goes leaves its pods as they
    /// are: that nobody describes them any more does not mean that they are gone.
    async fn inference_pool(&mut self, name: &str, rules: &PodRules) -> Infallible {
        let fields = Some(format!("metadata.name={name}"));
        let mut pools = self.reflector::<InferencePool>(Selector { labels: None, fields });
        let mut spec = InferencePoolSpec::default();
        let mut pods: Option<Reflector<Pod>> = None;
        loop {
            let pods_step = async {
                match &mut pods {
                    Some(pods) => pods.next().await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                step = pools.next() => {
                    if self.is_pool_news(step) {
                        let found = pools.objects().next().map(|pool| pool.spec.clone());
                        self.pool_changed(name, found, &mut spec, &mut pods);
                    }
                }
                step = pods_step => {
                    if let Some(pods) = &pods {
                        self.pods_stepped(step, pods, rules, &spec.ports());
                    }
                }
            }
        }
    }

    fn pool_changed(
        &mut self,
        name: &str,
        found: Option<InferencePoolSpec>,
        spec: &mut InferencePoolSpec,
        pods: &mut Option<Reflector<Pod>>,
    ) {
        let Some(found) = found else {
            warn!(model = %self.task.model, pool = name, namespace = %self.namespace, "there is no such InferencePool");
            return self.tell(Update::Failed("no_pool"));
        };
        let Some(selector) = found.selector() else {
            warn!(model = %self.task.model, pool = name, "the InferencePool's selector has no matchLabels");
            return self.tell(Update::Failed("no_pool"));
        };
        if *spec != found {
            info!(model = %self.task.model, pool = name, selector, ports = ?found.ports(), "following an InferencePool");
            *spec = found;
            *pods = Some(self.reflector(Selector { labels: Some(selector), fields: None }));
        }
    }

    fn reflector<T: resources::Resource>(&self, selector: Selector) -> Reflector<T> {
        Reflector::new(self.task.client.clone(), &self.namespace, selector)
    }

    fn pods_stepped(
        &mut self,
        step: Result<Step, Failure>,
        pods: &Reflector<Pod>,
        rules: &PodRules,
        pool_ports: &[u16],
    ) {
        if !self.is_news(step) {
            return;
        }
        let mut wrong = HashSet::new();
        let mut listing = Vec::new();
        for pod in pods.objects() {
            // A pod that is no endpoint is none for a reason that its own status tells.
            listing.extend(pods::endpoints(pod, rules, pool_ports, &mut wrong).into_iter().flatten());
        }
        self.warn_of(wrong);
        self.tell(Update::Listed(listing));
    }

    /// Each wrong value once, for as long as it is there.
    fn warn_of(&mut self, wrong: HashSet<Wrong>) {
        let mut new: Vec<&Wrong> = wrong.difference(&self.warned).collect();
        new.sort();
        for Wrong { pod, key, value, expected } in &new {
            warn!(model = %self.task.model, pod, key, value, expected, "pod says something of itself that cannot be");
        }
        let n_new = new.len();
        self.warned = wrong;
        if n_new > 0 {
            self.tell(Update::WrongHints(n_new));
        }
    }

    /// Whether the copy may be another one now; failures are told.
    fn is_news(&mut self, step: Result<Step, Failure>) -> bool {
        if matches!(step, Ok(Step::Confirmed)) {
            self.tell(Update::Confirmed);
        }
        let news = noted(&mut self.outage, &self.task.model, step);
        self.told(news)
    }

    /// As [`Self::is_news`] for the InferencePool itself: that it is heard of confirms no endpoint.
    fn is_pool_news(&mut self, step: Result<Step, Failure>) -> bool {
        let news = noted(&mut self.pool_outage, &self.task.model, step);
        self.told(news)
    }

    fn told(&mut self, news: Result<bool, &'static str>) -> bool {
        news.unwrap_or_else(|reason| {
            self.tell(Update::Failed(reason));
            false
        })
    }

    fn tell(&mut self, update: Update) {
        (self.task.on_update)(update);
    }
}

/// Notes a step in the log: whether it is news, or the kind of its failure.
fn noted(outage: &mut Outage, model: &str, step: Result<Step, Failure>) -> Result<bool, &'static str> {
    match step {
        // A list alone ends no outage: the right to watch may be missing.
        Ok(Step::Listed) => Ok(true),
        Ok(step) => {
            outage.ended();
            Ok(step == Step::Changed)
        }
        // The list that follows at once puts it right.
        Err(failure @ (Failure::Expired | Failure::Silent)) => {
            info!(model, reason = failure.as_str(), "the watch is begun anew");
            Err(failure.as_str())
        }
        Err(failure) => {
            outage.failed(&failure);
            Err(failure.as_str())
        }
    }
}
