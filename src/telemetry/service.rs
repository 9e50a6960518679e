//! Under which name and attributes the process tells of itself.

use opentelemetry::Key;
use opentelemetry_sdk::Resource;

/// `service.name` when the environment names none.
pub(super) const NAME: &str = env!("CARGO_PKG_NAME");

/// Attributes of the service, as the SDK reads them from the environment, under our name unless given one.
pub(super) fn resource() -> Resource {
    let from_environment = Resource::builder().build();
    let name = from_environment.get(&Key::from_static_str("service.name"));
    let is_named = name.is_some_and(|name| !name.as_str().starts_with("unknown_service"));
    let builder = Resource::builder();
    if is_named { builder.build() } else { builder.with_service_name(NAME).build() }
}

/// The same as text.
pub(super) fn attributes() -> Vec<(String, String)> {
    resource().iter().map(|(key, value)| (key.to_string(), value.to_string())).collect()
}
