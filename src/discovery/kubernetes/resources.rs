//! What is read of Kubernetes objects, and nothing else of them.
//!
//! Not the complete types: a pool's pods are listed again and again, most of a pod is of no use here and may hold
//! secrets, and an object with one odd field elsewhere shall not cost the whole list.

use std::collections::BTreeMap;

use serde::Deserialize;

/// An object that can be listed and watched.
pub(super) trait Resource: serde::de::DeserializeOwned + Clone + Send + 'static {
    /// Path of the API group and version.
    const API: &'static str;
    /// Plural name.
    const PLURAL: &'static str;

    fn metadata(&self) -> &Metadata;
}

/// `metadata` of an object.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub(super) struct Metadata {
    pub(super) name: String,
    pub(super) uid: String,
    pub(super) creation_timestamp: String,
    pub(super) deletion_timestamp: Option<String>,
    pub(super) labels: BTreeMap<String, String>,
    pub(super) annotations: BTreeMap<String, String>,
}

/// A page of a list.
#[derive(Deserialize)]
#[serde(bound(deserialize = "T: Resource"))]
pub(super) struct List<T> {
    pub(super) metadata: ListMetadata,
    // Some API servers write an empty list as null.
    #[serde(default)]
    pub(super) items: Option<Vec<T>>,
}

/// `metadata` of a list.
#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct ListMetadata {
    pub(super) resource_version: String,
    #[serde(default, rename = "continue")]
    pub(super) next_page: Option<String>,
}

/// `v1` `Pod`
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub(super) struct Pod {
    pub(super) metadata: Metadata,
    pub(super) status: PodStatus,
}

/// `status` of a pod.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub(super) struct PodStatus {
    pub(super) phase: String,
    #[serde(rename = "podIP")]
    pub(super) pod_ip: String,
    pub(super) conditions: Vec<Condition>,
    pub(super) container_statuses: Vec<ContainerStatus>,
}

/// `status.conditions[]`
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub(super) struct Condition {
    #[serde(rename = "type")]
    pub(super) kind: String,
    pub(super) status: String,
}

/// `status.containerStatuses[]`
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub(super) struct ContainerStatus {
    pub(super) restart_count: u32,
}

/// `discovery.k8s.io/v1` `EndpointSlice`
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub(super) struct EndpointSlice {
    pub(super) metadata: Metadata,
    pub(super) address_type: String,
    /// Null where the Service has none.
    pub(super) endpoints: Option<Vec<SliceEndpoint>>,
    pub(super) ports: Option<Vec<SlicePort>>,
}

/// `endpoints[]` of a slice.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub(super) struct SliceEndpoint {
    pub(super) addresses: Vec<String>,
    pub(super) conditions: SliceConditions,
    pub(super) target_ref: Option<TargetRef>,
}

/// `endpoints[].conditions`; what is absent is unknown.
#[derive(Clone, Copy, Debug, Default, Deserialize)]
#[serde(default)]
pub(super) struct SliceConditions {
    pub(super) ready: Option<bool>,
    pub(super) terminating: Option<bool>,
}

/// `endpoints[].targetRef`
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub(super) struct TargetRef {
    pub(super) uid: String,
}

/// `ports[]` of a slice.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub(super) struct SlicePort {
    pub(super) name: Option<String>,
    pub(super) port: Option<u16>,
    pub(super) protocol: Option<String>,
}

/// `inference.networking.k8s.io/v1` `InferencePool`
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub(super) struct InferencePool {
    pub(super) metadata: Metadata,
    pub(super) spec: InferencePoolSpec,
}

/// `spec` of a pool.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub(super) struct InferencePoolSpec {
    pub(super) selector: PoolSelector,
    pub(super) target_ports: Vec<TargetPort>,
}

/// `spec.selector`
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub(super) struct PoolSelector {
    pub(super) match_labels: BTreeMap<String, String>,
}

/// `spec.targetPorts[]`
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(default)]
pub(super) struct TargetPort {
    pub(super) number: u16,
}

impl InferencePoolSpec {
    /// Its selector as a query has it; none when it selects nothing.
    pub(super) fn selector(&self) -> Option<String> {
        let labels: Vec<String> =
            self.selector.match_labels.iter().map(|(key, value)| format!("{key}={value}")).collect();
        if labels.is_empty() { None } else { Some(labels.join(",")) }
    }

    pub(super) fn ports(&self) -> Vec<u16> {
        self.target_ports.iter().map(|port| port.number).filter(|port| *port > 0).collect()
    }
}

impl Resource for Pod {
    const API: &'static str = "/api/v1";
    const PLURAL: &'static str = "pods";

    fn metadata(&self) -> &Metadata {
        &self.metadata
    }
}

impl Resource for EndpointSlice {
    const API: &'static str = "/apis/discovery.k8s.io/v1";
    const PLURAL: &'static str = "endpointslices";

    fn metadata(&self) -> &Metadata {
        &self.metadata
    }
}

impl Resource for InferencePool {
    const API: &'static str = "/apis/inference.networking.k8s.io/v1";
    const PLURAL: &'static str = "inferencepools";

    fn metadata(&self) -> &Metadata {
        &self.metadata
    }
}
