//! Builds our side of the ext_proc protocol; no decision is taken here.

use std::collections::HashMap;

use envoy_types::pb::envoy::config::core::v3::header_value_option::HeaderAppendAction;
use envoy_types::pb::envoy::config::core::v3::{HeaderValue, HeaderValueOption};
use envoy_types::pb::envoy::service::ext_proc::v3::body_mutation::Mutation;
use envoy_types::pb::envoy::service::ext_proc::v3::processing_response::Response;
use envoy_types::pb::envoy::service::ext_proc::v3::{
    BodyMutation, BodyResponse, CommonResponse, HeaderMutation, HeadersResponse, ImmediateResponse, ProcessingResponse,
    TrailersResponse,
};
use envoy_types::pb::envoy::r#type::v3::HttpStatus;
use envoy_types::pb::google::protobuf::{Struct, Value, value::Kind};
use serde_json::json;

use super::decide::{Refusal, Routed, Verdict};
use super::message::RANK_HEADER;
use crate::routing::pick::Pick;

/// Namespace of the dynamic metadata that Envoy's `override_host` policy reads.
const METADATA_NAMESPACE: &str = "envoy.lb";
/// Headers that steer some Envoy cluster to an endpoint: a client must not choose for itself.
const ROUTING_HEADERS: [&str; 2] = ["x-gateway-destination-endpoint", "target-pod"];

/// Which of the request steps a reply answers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RequestStep {
    /// The request headers.
    Headers,
    /// The request body.
    Body,
}

/// Builds replies that set or clear the selection header.
#[derive(Clone, Debug)]
pub struct Replies {
    selection_header: String,
    cleared: Vec<String>,
}

impl Replies {
    /// Replies for a configured selection header, in lower case.
    pub fn new(selection_header: &str) -> Self {
        let others = ROUTING_HEADERS.iter().filter(|name| **name != selection_header);
        let cleared = std::iter::once(selection_header).chain(others.copied()).map(str::to_owned).collect();
        Self { selection_header: selection_header.to_owned(), cleared }
    }

    /// Lets the request go on and takes the client's routing headers away.
    pub fn pass(&self, step: RequestStep) -> ProcessingResponse {
        reply(step, HeaderMutation { remove_headers: self.cleared.clone(), ..Default::default() })
    }

    /// Answers the step that a verdict was asked for.
    pub fn verdict(&self, step: RequestStep, verdict: &Verdict) -> ProcessingResponse {
        match verdict {
            Verdict::Route(routed) => self.route(step, routed),
            Verdict::Leave(_) => self.pass(step),
            Verdict::Refuse(refusal) => refuse(*refusal),
        }
    }

    fn route(&self, step: RequestStep, routed: &Routed) -> ProcessingResponse {
        let destination = destination(&routed.decision.pick);
        let header = |name: &str, value: String| {
            overwrite(HeaderValue { key: name.to_owned(), raw_value: value.into_bytes(), ..Default::default() })
        };
        let mut set_headers = vec![header(&self.selection_header, destination.clone())];
        set_headers.extend(routed.steered_rank.map(|rank| header(RANK_HEADER, rank.to_string())));
        let mutation = HeaderMutation {
            set_headers,
            // Without the selection header: Envoy must not be told to remove what it is told to set.
            remove_headers: self.cleared[1..].to_vec(),
        };
        let mut response = reply(step, mutation);
        response.dynamic_metadata = Some(self.metadata(destination));
        response
    }

    fn metadata(&self, destination: String) -> Struct {
        let inner = structure(&self.selection_header, Kind::StringValue(destination));
        structure(METADATA_NAMESPACE, Kind::StructValue(inner))
    }
}

/// The pick, then its runner-up: `override_host` walks the list, one entry per attempt.
fn destination(pick: &Pick) -> String {
    match &pick.alternate {
        Some(alternate) => format!("{},{}", pick.endpoint.address, alternate.address),
        None => pick.endpoint.address.to_string(),
    }
}

fn structure(name: &str, kind: Kind) -> Struct {
    Struct { fields: HashMap::from([(name.to_owned(), Value { kind: Some(kind) })]) }
}

fn overwrite(header: HeaderValue) -> HeaderValueOption {
    HeaderValueOption {
        header: Some(header),
        append_action: HeaderAppendAction::OverwriteIfExistsOrAdd.into(),
        ..Default::default()
    }
}

fn reply(step: RequestStep, mutation: HeaderMutation) -> ProcessingResponse {
    common(step, Some(CommonResponse { header_mutation: Some(mutation), ..Default::default() }))
}

/// Lets a further message of a request step pass and changes nothing.
pub fn untouched(step: RequestStep) -> ProcessingResponse {
    common(step, None)
}

fn common(step: RequestStep, response: Option<CommonResponse>) -> ProcessingResponse {
    respond(match step {
        RequestStep::Headers => Response::RequestHeaders(HeadersResponse { response }),
        RequestStep::Body => Response::RequestBody(BodyResponse { response }),
    })
}

/// Lets a request go on with another body than the client's; a reply to anything but the body stays as it is.
///
/// The length goes with it: Envoy (1.40.0) sends on the one that we set, also for a body that came in chunks.
pub fn with_body(mut reply: ProcessingResponse, body: Vec<u8>) -> ProcessingResponse {
    if let Some(Response::RequestBody(BodyResponse { response: Some(common) })) = &mut reply.response {
        let value = body.len().to_string().into_bytes();
        let length = HeaderValue { key: "content-length".to_owned(), raw_value: value, ..Default::default() };
        common.header_mutation.get_or_insert_default().set_headers.push(overwrite(length));
        common.body_mutation = Some(BodyMutation { mutation: Some(Mutation::Body(body)) });
    }
    reply
}

/// An error of ours, in the shape of OpenAI's API.
fn refuse(refusal: Refusal) -> ProcessingResponse {
    let error = json!({
        "message": refusal.message(), "type": "service_unavailable", "param": null, "code": refusal.as_str(),
    });
    let content_type =
        HeaderValue { key: "content-type".to_owned(), raw_value: b"application/json".to_vec(), ..Default::default() };
    respond(Response::ImmediateResponse(ImmediateResponse {
        status: Some(HttpStatus { code: 503 }),
        headers: Some(HeaderMutation { set_headers: vec![overwrite(content_type)], ..Default::default() }),
        body: json!({ "error": error }).to_string().into_bytes(),
        details: format!("warmroute_{}", refusal.as_str()),
        ..Default::default()
    }))
}

/// Lets the request trailers pass.
pub fn request_trailers() -> ProcessingResponse {
    respond(Response::RequestTrailers(TrailersResponse::default()))
}

/// Lets the response headers pass.
pub fn response_headers() -> ProcessingResponse {
    respond(Response::ResponseHeaders(HeadersResponse::default()))
}

/// Lets a piece of the response body pass.
pub fn response_body() -> ProcessingResponse {
    respond(Response::ResponseBody(BodyResponse::default()))
}

/// Lets the response trailers pass.
pub fn response_trailers() -> ProcessingResponse {
    respond(Response::ResponseTrailers(TrailersResponse::default()))
}

fn respond(response: Response) -> ProcessingResponse {
    ProcessingResponse { response: Some(response), ..Default::default() }
}
