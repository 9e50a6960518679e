//! Builds our side of the ext_proc protocol; no decision is taken here.

use std::collections::HashMap;
use std::str::FromStr;

use envoy_types::pb::envoy::config::core::v3::header_value_option::HeaderAppendAction;
use envoy_types::pb::envoy::config::core::v3::{HeaderValue, HeaderValueOption};
use envoy_types::pb::envoy::service::ext_proc::v3::body_mutation::Mutation;
use envoy_types::pb::envoy::service::ext_proc::v3::processing_response::Response;
use envoy_types::pb::envoy::service::ext_proc::v3::{
    BodyMutation, BodyResponse, CommonResponse, HeaderMutation, HeadersResponse, ImmediateResponse, ProcessingResponse,
    StreamedBodyResponse, TrailersResponse,
};
use envoy_types::pb::envoy::r#type::v3::HttpStatus;
use envoy_types::pb::google::protobuf::{Struct, Value, value::Kind};
use serde::Serialize;
use serde_json::json;

use super::decide::{Refusal, Routed, Verdict};
use super::echo::Side;
use super::message::RANK_HEADER;
use crate::routing::pick::Pick;

/// Namespace of the dynamic metadata in which Envoy looks for the endpoint.
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

/// What Envoy does with the endpoint that it is told.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum SelectionMode {
    /// Its `override_host` policy dials it if its cluster has it, walks a list, and picks by itself where it is told
    /// nothing.
    OverrideHost,
    /// Its `ORIGINAL_DST` cluster dials whatever single address it is told, and answers 503 where it is told nothing.
    OriginalDst,
}

impl SelectionMode {
    /// Whether Envoy serves a request for which it is told nothing.
    pub fn has_fallback(self) -> bool {
        self == Self::OverrideHost
    }
}

impl FromStr for SelectionMode {
    type Err = ();

    fn from_str(text: &str) -> Result<Self, ()> {
        match text {
            "override_host" => Ok(Self::OverrideHost),
            "original_dst" => Ok(Self::OriginalDst),
            _ => Err(()),
        }
    }
}

/// How Envoy is told the endpoint.
#[derive(Clone, Debug)]
pub struct Selection {
    /// What Envoy does with it.
    pub mode: SelectionMode,
    /// Header, lower case, and key in the metadata.
    pub header: String,
}

/// Builds replies that set or clear the selection header.
#[derive(Clone, Debug)]
pub struct Replies {
    selection: Selection,
    /// The selection header first.
    cleared: Vec<String>,
}

impl Replies {
    /// Replies that name an endpoint in this way.
    pub fn new(selection: Selection) -> Self {
        let others = ROUTING_HEADERS.iter().filter(|name| **name != selection.header);
        let cleared = std::iter::once(&*selection.header).chain(others.copied()).map(str::to_owned).collect();
        Self { selection, cleared }
    }

    /// Lets the request go on and takes the client's routing headers away.
    pub fn pass(&self, step: RequestStep) -> ProcessingResponse {
        reply(step, HeaderMutation { remove_headers: self.cleared.clone(), ..Default::default() })
    }

    /// Answers the step that a verdict was asked for.
    pub fn verdict(&self, step: RequestStep, verdict: &Verdict) -> ProcessingResponse {
        match verdict {
            Verdict::Route(routed) => self.route(step, routed),
            Verdict::Shadow(_) | Verdict::Leave(_) => self.pass(step),
            Verdict::Refuse(refusal) => refuse(*refusal),
        }
    }

    fn route(&self, step: RequestStep, routed: &Routed) -> ProcessingResponse {
        let destination = self.destination(&routed.decision.pick);
        let header = |name: &str, value: String| {
            overwrite(HeaderValue { key: name.to_owned(), raw_value: value.into_bytes(), ..Default::default() })
        };
        let mut set_headers = vec![header(&self.selection.header, destination.clone())];
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
        let inner = structure(&self.selection.header, Kind::StringValue(destination));
        structure(METADATA_NAMESPACE, Kind::StructValue(inner))
    }

    /// The pick, then its runner-up: `override_host` walks the list, one entry per attempt. `ORIGINAL_DST` takes a list
    /// for no address at all.
    fn destination(&self, pick: &Pick) -> String {
        match &pick.alternate {
            Some(alternate) if self.selection.mode == SelectionMode::OverrideHost => {
                format!("{},{}", pick.endpoint.address, alternate.address)
            }
            Some(_) | None => pick.endpoint.address.to_string(),
        }
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
        set_length(common, body.len());
        common.body_mutation = Some(BodyMutation { mutation: Some(Mutation::Body(body)) });
    }
    reply
}

/// Announces the length of another body than the client's, which follows in pieces; for a reply to the headers.
///
/// Envoy (1.40.0) sends no length at all in full duplex, unless its filter is set to `allow_content_length_header`.
pub fn with_length(mut reply: ProcessingResponse, n_bytes: usize) -> ProcessingResponse {
    if let Some(Response::RequestHeaders(HeadersResponse { response: Some(common) })) = &mut reply.response {
        set_length(common, n_bytes);
    }
    reply
}

fn set_length(common: &mut CommonResponse, n_bytes: usize) {
    let value = n_bytes.to_string().into_bytes();
    let length = HeaderValue { key: "content-length".to_owned(), raw_value: value, ..Default::default() };
    common.header_mutation.get_or_insert_default().set_headers.push(overwrite(length));
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

/// Lets the trailers pass.
pub fn trailers(side: Side) -> ProcessingResponse {
    let trailers = TrailersResponse::default();
    respond(match side {
        Side::Request => Response::RequestTrailers(trailers),
        Side::Response => Response::ResponseTrailers(trailers),
    })
}

/// Lets the response headers pass.
pub fn response_headers() -> ProcessingResponse {
    respond(Response::ResponseHeaders(HeadersResponse::default()))
}

/// Lets a piece of the response body pass, where Envoy keeps it.
pub fn response_body() -> ProcessingResponse {
    respond(Response::ResponseBody(BodyResponse::default()))
}

/// Sends a piece of a body back, where Envoy has given it away.
pub fn piece(side: Side, body: Vec<u8>, end_of_stream: bool) -> ProcessingResponse {
    let piece = StreamedBodyResponse { body, end_of_stream, ..Default::default() };
    let mutation = BodyMutation { mutation: Some(Mutation::StreamedResponse(piece)) };
    let common = CommonResponse { body_mutation: Some(mutation), ..Default::default() };
    let response = BodyResponse { response: Some(common) };
    respond(match side {
        Side::Request => Response::RequestBody(response),
        Side::Response => Response::ResponseBody(response),
    })
}

fn respond(response: Response) -> ProcessingResponse {
    ProcessingResponse { response: Some(response), ..Default::default() }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    /// The bytes of a piece of the request's body, and whether it is the last.
    pub(in super::super) fn request_piece(reply: &ProcessingResponse) -> Option<(&[u8], bool)> {
        match reply.response.as_ref()? {
            Response::RequestBody(body) => streamed(body),
            _ => None,
        }
    }

    /// The same of the response's body.
    pub(in super::super) fn response_piece(reply: &ProcessingResponse) -> Option<(&[u8], bool)> {
        match reply.response.as_ref()? {
            Response::ResponseBody(body) => streamed(body),
            _ => None,
        }
    }

    fn streamed(body: &BodyResponse) -> Option<(&[u8], bool)> {
        match body.response.as_ref()?.body_mutation.as_ref()?.mutation.as_ref()? {
            Mutation::StreamedResponse(piece) => Some((&piece.body, piece.end_of_stream)),
            Mutation::Body(_) | Mutation::ClearBody(_) => None,
        }
    }
}
