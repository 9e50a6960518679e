//! What Envoy's messages say, as plain values.

use std::net::SocketAddr;
use std::str::FromStr;

use envoy_types::pb::envoy::config::core::v3::{HeaderMap, Metadata};
use envoy_types::pb::envoy::extensions::filters::http::ext_proc::v3::processing_mode::BodySendMode;
use envoy_types::pb::envoy::service::ext_proc::v3::{HttpHeaders, ProcessingRequest};
use envoy_types::pb::google::protobuf::{Value, value::Kind};
use serde::Serialize;

/// Metadata namespace in which a gateway names the endpoints to choose from (endpoint-picker protocol 1.0).
const SUBSET_NAMESPACE: &str = "envoy.lb.subset_hint";
/// Key of that list.
const SUBSET_KEY: &str = "x-gateway-destination-endpoint-subset";

/// How Envoy sends a body.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum BodyMode {
    /// Not at all: only the headers can decide.
    None,
    /// In pieces, after the endpoint was picked: too late to decide.
    Streamed,
    /// In one message, whole.
    Buffered,
    /// In one message, cut at Envoy's limit.
    BufferedPartial,
    /// In pieces that we have to send back; the headers wait for our answer.
    FullDuplexStreamed,
    /// As gRPC messages, which no request of ours consists of.
    Grpc,
}

impl BodyMode {
    fn of(mode: BodySendMode) -> Self {
        match mode {
            BodySendMode::None => Self::None,
            BodySendMode::Streamed => Self::Streamed,
            BodySendMode::Buffered => Self::Buffered,
            BodySendMode::BufferedPartial => Self::BufferedPartial,
            BodySendMode::FullDuplexStreamed => Self::FullDuplexStreamed,
            BodySendMode::Grpc => Self::Grpc,
        }
    }

    /// Envoy's name for it, in lower case.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::None => "none",
            Self::Streamed => "streamed",
            Self::Buffered => "buffered",
            Self::BufferedPartial => "buffered_partial",
            Self::FullDuplexStreamed => "full_duplex_streamed",
            Self::Grpc => "grpc",
        }
    }
}

/// The modes in which a request's prompt can decide.
impl FromStr for BodyMode {
    type Err = ();

    fn from_str(text: &str) -> Result<Self, ()> {
        match text {
            "buffered" => Ok(Self::Buffered),
            "full_duplex_streamed" => Ok(Self::FullDuplexStreamed),
            _ => Err(()),
        }
    }
}

/// How Envoy sends the bodies of one stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Modes {
    /// The request's.
    pub request: BodyMode,
    /// The response's.
    pub response: BodyMode,
}

impl Modes {
    /// As the first message of a stream tells them; where it does not (an old Envoy), the request's is `assumed`,
    /// and the response's is what belongs to it.
    pub fn of(message: &ProcessingRequest, assumed: BodyMode) -> Self {
        let Some(config) = &message.protocol_config else {
            let response =
                if assumed == BodyMode::FullDuplexStreamed { BodyMode::FullDuplexStreamed } else { BodyMode::None };
            return Self { request: assumed, response };
        };
        Self { request: BodyMode::of(config.request_body_mode()), response: BodyMode::of(config.response_body_mode()) }
    }

    /// What is wrong with them, as a metric names it: the prompt does not come in time, or the stream ends before the
    /// answer does, because in full duplex Envoy keeps it only for as long as there is something to be sent back.
    pub fn misconfigured(self) -> Option<&'static str> {
        match self {
            Self { request: BodyMode::Buffered, .. }
            | Self { request: BodyMode::FullDuplexStreamed, response: BodyMode::FullDuplexStreamed } => None,
            Self { request: BodyMode::FullDuplexStreamed, .. } => Some("full_duplex_streamed_without_response"),
            Self { request, .. } => Some(request.as_str()),
        }
    }
}

/// Header by which a client, or we, choose one of an engine's data-parallel ranks (vLLM 0.32.0,
/// `entrypoints/generate/base/serving.py`; what is no number is ignored there).
pub const RANK_HEADER: &str = "x-data-parallel-rank";

/// Header that names a request, to which Envoy gives one where the client does not, before any filter sees it.
pub const REQUEST_ID_HEADER: &str = "x-request-id";

/// What the request headers step tells.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct RequestHead {
    /// `:path` with query; empty when the headers were not sent.
    pub path: String,
    /// The endpoints that the gateway allows; none when it does not restrict them.
    pub subset: Option<Vec<SocketAddr>>,
    /// The data-parallel rank that the client has chosen.
    pub rank: Option<u32>,
    /// `x-request-id`, as Envoy or its client gave it.
    pub request_id: Option<String>,
}

impl RequestHead {
    /// Reads the request headers message.
    pub fn of(headers: &HttpHeaders, metadata: Option<&Metadata>) -> Self {
        let value = |name| headers.headers.as_ref().and_then(|map| header(map, name));
        let rank = value(RANK_HEADER).and_then(|rank| rank.trim().parse().ok());
        Self {
            path: value(":path").unwrap_or_default(),
            subset: metadata.and_then(subset),
            rank,
            request_id: value(REQUEST_ID_HEADER).filter(|id| !id.is_empty()),
        }
    }

    /// Whether the gateway allows the request, and what it says, at an endpoint.
    pub fn allows(&self, endpoint: &SocketAddr) -> bool {
        self.subset.as_ref().is_none_or(|subset| subset.contains(endpoint))
    }
}

fn subset(metadata: &Metadata) -> Option<Vec<SocketAddr>> {
    let value = metadata.filter_metadata.get(SUBSET_NAMESPACE)?.fields.get(SUBSET_KEY)?;
    let mut addresses = Vec::new();
    collect_addresses(value, &mut addresses);
    Some(addresses)
}

/// The list is a string with commas or a list of such strings; what is no address cannot be picked.
fn collect_addresses(value: &Value, addresses: &mut Vec<SocketAddr>) {
    match &value.kind {
        Some(Kind::StringValue(text)) => {
            addresses.extend(text.split(',').filter_map(|part| part.trim().parse::<SocketAddr>().ok()));
        }
        Some(Kind::ListValue(list)) => {
            let strings = list.values.iter().filter(|item| matches!(item.kind, Some(Kind::StringValue(_))));
            strings.for_each(|item| collect_addresses(item, addresses));
        }
        _ => {}
    }
}

/// What the response headers step tells about who served.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Served {
    /// `:status`; 0 when it is unreadable.
    pub status: u16,
    /// `upstream.address`: the host that answered; none when Envoy answered itself.
    pub address: Option<SocketAddr>,
    /// `upstream.request_attempt_count`, 1 without a retry; none when Envoy is not configured to send it.
    pub n_attempts: Option<u32>,
}

impl Served {
    /// Reads the response headers message.
    pub fn of(message: &ProcessingRequest, headers: &HttpHeaders) -> Self {
        let status = headers.headers.as_ref().and_then(|map| header(map, ":status"));
        let attribute =
            |name| message.attributes.values().find_map(|attributes| attributes.fields.get(name)?.kind.as_ref());
        Self {
            status: status.and_then(|status| status.parse().ok()).unwrap_or(0),
            address: match attribute("upstream.address") {
                Some(Kind::StringValue(address)) => address.parse().ok(),
                _ => None,
            },
            n_attempts: match attribute("upstream.request_attempt_count") {
                Some(Kind::NumberValue(n)) => Some(*n as u32),
                _ => None,
            },
        }
    }
}

/// Value of a header. Envoy fills `raw_value` (1.28 and later) or, before, `value`.
fn header(map: &HeaderMap, name: &str) -> Option<String> {
    let header = map.headers.iter().find(|header| header.key.eq_ignore_ascii_case(name))?;
    let raw = if header.raw_value.is_empty() { header.value.as_bytes() } else { &header.raw_value };
    Some(String::from_utf8_lossy(raw).into_owned())
}
