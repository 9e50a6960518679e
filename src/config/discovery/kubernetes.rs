//! `models[].discovery.kubernetes`

use std::str::FromStr;

use serde::Serialize;

use super::labels::{is_key, is_object_name, is_selector, is_value};
use super::{read_event_ports, read_optional_port};
use crate::config::reader::Node;
use crate::discovery::kubernetes::{PodRules, Publishing, Query, SliceRules};
use crate::discovery::listed::EventPorts;

/// `models[].discovery.kubernetes`: pods by label, unless a Service or an InferencePool is named.
#[derive(Clone, Debug, Serialize)]
pub struct Kubernetes {
    /// Namespace; null: our own, that is the service account's, or the kubeconfig's.
    pub namespace: Option<String>,
    /// Whose labels the pods have: `aibrix` (default), `llm-d` or `none`, which is the default where `service` or
    /// `inference_pool` is given.
    pub preset: Preset,
    /// Label selector of the pods instead of the preset's.
    pub selector: Option<String>,
    /// Label `key=value` of the pods that publish KV events, instead of the preset's; empty: all pods do.
    pub events_label: Option<String>,
    /// Name of a Service: the endpoints are those of its EndpointSlices.
    pub service: Option<String>,
    /// Name of an InferencePool (`inference.networking.k8s.io/v1`): the endpoints are its pods, with its target ports.
    pub inference_pool: Option<String>,
    /// Port of the engines; null: the Service's or the InferencePool's own, or 8000.
    pub port: Option<u16>,
    /// Port on which rank 0 publishes KV events, default 5557; rank r is r further.
    pub events_port: u16,
    /// Port of the replay, default 5558.
    pub replay_port: u16,
    /// Data-parallel ranks, default 1.
    pub ranks: u32,
}

/// `models[].discovery.kubernetes.preset`: whose labels the pods have.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Preset {
    /// `model.aibrix.ai/name` is the model, `model.aibrix.ai/kv-events-enabled: "true"` says that there are events,
    /// `model.aibrix.ai/port` which port to use.
    Aibrix,
    /// `llm-d.ai/model` is the model, and all pods publish.
    LlmD,
    /// No labels: there is a selector, and all pods publish.
    None,
}

impl FromStr for Preset {
    type Err = ();

    fn from_str(text: &str) -> Result<Self, ()> {
        match text {
            "aibrix" => Ok(Self::Aibrix),
            "llm-d" => Ok(Self::LlmD),
            "none" => Ok(Self::None),
            _ => Err(()),
        }
    }
}

impl Preset {
    /// Label whose value is the model's name.
    fn model_label(self) -> Option<&'static str> {
        match self {
            Self::Aibrix => Some("model.aibrix.ai/name"),
            Self::LlmD => Some("llm-d.ai/model"),
            Self::None => None,
        }
    }

    fn events_label(self) -> &'static str {
        match self {
            Self::Aibrix => "model.aibrix.ai/kv-events-enabled=true",
            Self::LlmD | Self::None => "",
        }
    }

    fn port_label(self) -> Option<&'static str> {
        match self {
            Self::Aibrix => Some("model.aibrix.ai/port"),
            Self::LlmD | Self::None => None,
        }
    }
}

impl Kubernetes {
    /// Where the endpoints of `model` are found.
    pub fn query(&self, model: &str) -> Query {
        let events = EventPorts { events: self.events_port, replay: self.replay_port, ranks: self.ranks };
        if let Some(name) = &self.service {
            return Query::Service { name: name.clone(), rules: SliceRules { port: self.port, events } };
        }
        let rules =
            PodRules { port: self.port, port_label: self.preset.port_label(), publishing: self.publishing(), events };
        if let Some(name) = &self.inference_pool {
            return Query::InferencePool { name: name.clone(), rules };
        }
        let of_preset = || self.preset.model_label().map(|key| format!("{key}={model}"));
        let selector = self.selector.clone().or_else(of_preset).expect("the reader wants a selector or a preset");
        Query::Pods { selector, rules }
    }

    fn publishing(&self) -> Publishing {
        let label = self.events_label.as_deref().unwrap_or(self.preset.events_label());
        match label.split_once('=') {
            Some((key, value)) => Publishing::Labelled { key: key.to_owned(), value: value.to_owned() },
            None => Publishing::All,
        }
    }
}

pub(super) fn read_kubernetes(node: &Node<'_>, model: Option<&str>) -> Option<Kubernetes> {
    let [namespace, preset, selector, events_label, service, inference_pool, port, events_port, replay_port, ranks] =
        node.fields([
            "namespace",
            "preset",
            "selector",
            "events_label",
            "service",
            "inference_pool",
            "port",
            "events_port",
            "replay_port",
            "ranks",
        ]);
    let named = service.is_given() || inference_pool.is_given();
    let events = read_event_ports(&events_port, &replay_port, &ranks);
    let kubernetes = Kubernetes {
        namespace: read_object_name(&namespace, "a namespace"),
        preset: preset.or(if named { Preset::None } else { Preset::Aibrix }, "aibrix, llm-d or none"),
        selector: read_selector(&selector),
        events_label: read_events_label(&events_label),
        service: read_object_name(&service, "the name of a Service"),
        inference_pool: read_object_name(&inference_pool, "the name of an InferencePool"),
        port: read_optional_port(&port),
        events_port: events.events,
        replay_port: events.replay,
        ranks: events.ranks,
    };
    let given = [("selector", &selector), ("service", &service), ("inference_pool", &inference_pool)];
    let given: Vec<&str> = given.into_iter().filter(|(_, node)| node.is_given()).map(|(name, _)| name).collect();
    if given.len() > 1 {
        node.fault(given.join(" and "), "at most one of selector, service and inference_pool");
    }
    match (kubernetes.preset.model_label(), given.is_empty()) {
        (None, true) => preset.fault("none", "a selector, a service or an inference_pool beside it"),
        (Some(label), true) => {
            if let Some(model) = model.filter(|model| !is_value(model)) {
                let found = format!("a preset for {label}={model}, which no label can be");
                preset.fault(found, "a selector, a service or an inference_pool");
            }
        }
        (_, false) => {}
    }
    if service.is_given() {
        check_of_slices(&kubernetes, &preset, &events_label);
    }
    Some(kubernetes)
}

/// EndpointSlices have none of their pods' labels.
fn check_of_slices(kubernetes: &Kubernetes, preset: &Node<'_>, events_label: &Node<'_>) {
    if kubernetes.preset != Preset::None {
        preset.fault("labels of pods beside a service", "none: EndpointSlices do not have them");
    }
    if kubernetes.events_label.as_deref().is_some_and(|label| !label.is_empty()) {
        events_label.fault("a label of pods beside a service", "nothing: EndpointSlices do not have it");
    }
}

fn read_object_name(node: &Node<'_>, expected: &str) -> Option<String> {
    let name = node.string(expected)?;
    if !is_object_name(&name) {
        node.fault(format!("{name:?}"), expected);
    }
    Some(name)
}

fn read_selector(node: &Node<'_>) -> Option<String> {
    const EXPECTED: &str = "a label selector such as app=vllm,tier!=test";
    let selector = node.string(EXPECTED)?;
    if !is_selector(&selector) {
        node.fault(format!("{selector:?}"), EXPECTED);
    }
    Some(selector)
}

fn read_events_label(node: &Node<'_>) -> Option<String> {
    const EXPECTED: &str = "a label such as kv-events=true, or \"\" where all pods publish";
    let label = node.string(EXPECTED)?;
    let is_label = label.split_once('=').is_some_and(|(key, value)| is_key(key) && is_value(value));
    if !label.is_empty() && !is_label {
        node.fault(format!("{label:?}"), EXPECTED);
    }
    Some(label)
}

#[cfg(test)]
mod tests {
    use super::*;

    const BARE: Kubernetes = Kubernetes {
        namespace: None,
        preset: Preset::Aibrix,
        selector: None,
        events_label: None,
        service: None,
        inference_pool: None,
        port: None,
        events_port: 5557,
        replay_port: 5558,
        ranks: 1,
    };

    /// Selector, label of publishing pods and label of ports.
    fn pods(kubernetes: &Kubernetes) -> (String, Option<String>, Option<&'static str>) {
        match kubernetes.query("tiny") {
            Query::Pods { selector, rules } => {
                let label = match rules.publishing {
                    Publishing::All => None,
                    Publishing::Labelled { key, value } => Some(format!("{key}={value}")),
                };
                (selector, label, rules.port_label)
            }
            other => panic!("expected pods, found {other:?}"),
        }
    }

    #[test]
    fn a_preset_stands_for_the_labels_of_a_project() {
        let aibrix = Some("model.aibrix.ai/kv-events-enabled=true".to_owned());
        let port = Some("model.aibrix.ai/port");
        assert_eq!(pods(&BARE), ("model.aibrix.ai/name=tiny".to_owned(), aibrix.clone(), port));
        let llm_d = Kubernetes { preset: Preset::LlmD, ..BARE };
        assert_eq!(pods(&llm_d), ("llm-d.ai/model=tiny".to_owned(), None, None));
        let selected = Kubernetes { selector: Some("app=x".to_owned()), ..BARE };
        assert_eq!(pods(&selected), ("app=x".to_owned(), aibrix, port), "only the selector is replaced");
        let all = Kubernetes { events_label: Some(String::new()), ..BARE };
        assert_eq!(pods(&all).1, None);
        let labelled = Kubernetes { events_label: Some("kv=".to_owned()), ..llm_d };
        assert_eq!(pods(&labelled).1.as_deref(), Some("kv="));
    }

    #[test]
    fn services_and_pools_are_found_by_name() {
        let service = Kubernetes { service: Some("s".to_owned()), preset: Preset::None, port: Some(80), ..BARE };
        let events = EventPorts { events: 5557, replay: 5558, ranks: 1 };
        let rules = SliceRules { port: Some(80), events };
        assert_eq!(service.query("tiny"), Query::Service { name: "s".to_owned(), rules });
        let pool = Kubernetes { inference_pool: Some("p".to_owned()), preset: Preset::None, ..BARE };
        let rules = PodRules { port: None, port_label: None, publishing: Publishing::All, events };
        assert_eq!(pool.query("tiny"), Query::InferencePool { name: "p".to_owned(), rules });
    }
}
