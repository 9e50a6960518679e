//! Instruments of the endpoints: what is in flight there, and whether they serve what is sent to them.

use std::fmt;
use std::net::SocketAddr;
use std::sync::Arc;

use prometheus_client::encoding::{EncodeLabelSet, EncodeLabelValue, LabelValueEncoder};
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;

use super::catalog::Catalog;
use super::labels::{ENDPOINT, Label, MODEL, NOT_SERVED_CAUSE};
use super::rows::{ReadRows, Row, Rows, Series};
use super::{Metrics, ModelLabels};

/// Registered with the others, in [`Metrics`].
#[derive(Debug)]
pub(super) struct Instruments {
    picks_not_served: Family<NotServedLabels, Counter>,
    endpoint_avoided: Family<ModelLabels, Counter>,
    rows: Arc<Rows<EndpointRow>>,
}

/// One endpoint at the time of a scrape.
#[derive(Clone, Debug)]
pub struct EndpointRow {
    /// Model name of the endpoint's pool, as configured.
    pub model: Arc<str>,
    /// Address that Envoy dials.
    pub endpoint: SocketAddr,
    /// Requests that this router sent there and that have not ended.
    pub n_in_flight: u64,
}

/// Why another endpoint than the picked one served a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum NotServedCause {
    /// Envoy gave up on the picked endpoint and retried elsewhere.
    Retried,
    /// Envoy went elsewhere at once: our endpoints and its cluster differ.
    OtherEndpoint,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct NotServedLabels {
    model: Arc<str>,
    cause: NotServedCause,
}

impl Row for EndpointRow {
    const LABELS: &'static [Label] = &[MODEL, ENDPOINT];
    const SERIES: &'static [Series<Self>] =
        &[Series::gauge("endpoint_in_flight", "Requests that this router has in flight there", |row| row.n_in_flight)];

    fn label_values(&self) -> Vec<String> {
        vec![self.model.to_string(), self.endpoint.to_string()]
    }
}

impl Instruments {
    pub(super) fn register(catalog: &mut Catalog) -> Self {
        Self {
            picks_not_served: catalog.add(
                "picks_not_served",
                "Picks that did not serve at the first attempt",
                &[MODEL, NOT_SERVED_CAUSE],
            ),
            endpoint_avoided: catalog.add("endpoint_avoided", "Times an endpoint began to be avoided", &[MODEL]),
            rows: catalog.add_rows(),
        }
    }
}

impl Metrics {
    /// Makes the series of a pool whose picks have all served exist.
    pub(super) fn add_endpoints(&self, model: &Arc<str>) {
        drop(self.endpoints.endpoint_avoided.get_or_create(&ModelLabels { model: Arc::clone(model) }));
        for cause in [NotServedCause::Retried, NotServedCause::OtherEndpoint] {
            let labels = NotServedLabels { model: Arc::clone(model), cause };
            drop(self.endpoints.picks_not_served.get_or_create(&labels));
        }
    }

    /// Counts a request that another endpoint than the picked one served.
    pub fn count_pick_not_served(&self, model: &Arc<str>, cause: NotServedCause) {
        let labels = NotServedLabels { model: Arc::clone(model), cause };
        self.endpoints.picks_not_served.get_or_create(&labels).inc();
    }

    /// Counts that an endpoint began to be avoided.
    pub fn count_endpoint_avoided(&self, model: &Arc<str>) {
        self.endpoints.endpoint_avoided.get_or_create(&ModelLabels { model: Arc::clone(model) }).inc();
    }

    /// Sets where the per-endpoint series are read from.
    ///
    /// # Panics
    ///
    /// When called twice: there is one owner of the endpoints.
    pub fn set_endpoint_collector(&self, read: ReadRows<EndpointRow>) {
        self.endpoints.rows.set(read);
    }
}

impl NotServedCause {
    /// The label's value.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Retried => "retried",
            Self::OtherEndpoint => "other_endpoint",
        }
    }
}

impl EncodeLabelValue for NotServedCause {
    fn encode(&self, encoder: &mut LabelValueEncoder<'_>) -> fmt::Result {
        self.as_str().encode(encoder)
    }
}
