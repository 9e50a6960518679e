//! The grammar of Kubernetes' names, labels and label selectors
//! (<https://kubernetes.io/docs/concepts/overview/working-with-objects/labels/>): the API server refuses what does not
//! follow it, but only once everything runs.

/// Whether it is the name of an object.
pub(super) fn is_object_name(name: &str) -> bool {
    is_domain(name) && !name.contains(|c: char| c == '_' || c.is_ascii_uppercase())
}

/// Whether it is a name of DNS, those of services (`_http._tcp.…`) included.
pub(super) fn is_domain(name: &str) -> bool {
    name.len() <= 253 && name.split('.').all(|label| is_of(label.strip_prefix('_').unwrap_or(label), |c| c == '-'))
}

/// Whether it is a label's key: a name, perhaps behind a domain and a slash.
pub(super) fn is_key(key: &str) -> bool {
    let (prefix, name) = key.split_once('/').map_or((None, key), |(prefix, name)| (Some(prefix), name));
    prefix.is_none_or(is_object_name) && is_of(name, |c| matches!(c, '-' | '_' | '.'))
}

/// Whether it is a label's value; an empty one is.
pub(super) fn is_value(value: &str) -> bool {
    value.is_empty() || is_of(value, |c| matches!(c, '-' | '_' | '.'))
}

/// At most 63 letters, digits and what is allowed in between.
fn is_of(text: &str, is_inner: impl Fn(char) -> bool) -> bool {
    let is_end = |c: Option<char>| c.is_some_and(|c| c.is_ascii_alphanumeric());
    text.len() <= 63
        && is_end(text.chars().next())
        && is_end(text.chars().next_back())
        && text.chars().all(|c| c.is_ascii_alphanumeric() || is_inner(c))
}

/// Whether it is a selector: requirements with commas between them.
pub(super) fn is_selector(selector: &str) -> bool {
    let mut depth = 0_usize;
    let requirements = selector.split(|c| {
        match c {
            '(' => depth += 1,
            ')' => depth = depth.saturating_sub(1),
            _ => {}
        }
        c == ',' && depth == 0
    });
    requirements.map(str::trim).all(is_requirement)
}

fn is_requirement(requirement: &str) -> bool {
    if let Some((key, value)) = requirement.split_once("!=").or_else(|| requirement.split_once("==")) {
        return is_key(key.trim()) && is_value(value.trim());
    }
    if let Some((key, value)) = requirement.split_once('=') {
        return is_key(key.trim()) && is_value(value.trim());
    }
    if let Some((key, values)) = requirement.strip_suffix(')').and_then(|rest| rest.split_once('(')) {
        let mut words = key.split_whitespace();
        return words.next().is_some_and(is_key)
            && matches!(words.next(), Some("in" | "notin"))
            && words.next().is_none()
            && values.split(',').all(|value| is_value(value.trim()));
    }
    is_key(requirement.strip_prefix('!').unwrap_or(requirement))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn selectors_are_those_of_kubernetes() {
        for good in [
            "app=vllm",
            "app == vllm, tier!=test",
            "model.aibrix.ai/name=tiny",
            "app",
            "!canary",
            "env in (a, b),tier notin (c)",
            "app=",
            "a=b,c in (d,e),!f",
        ] {
            assert!(is_selector(good), "{good}");
        }
        for bad in [
            "",
            "app=a b",
            "app=/x",
            "=x",
            "a=b,",
            "env in a",
            "env on (a)",
            "env in extra (a)",
            "a/b/c=d",
            "ä=b",
            "a>1",
        ] {
            assert!(!is_selector(bad), "{bad}");
        }
    }

    #[test]
    fn names_and_values_are_those_of_kubernetes() {
        for (name, is_name) in
            [("engines.models.svc", true), ("engines", true), ("_http._tcp.engines", false), ("A", false)]
        {
            assert!(is_domain(name), "{name}");
            assert_eq!(is_object_name(name), is_name, "{name}");
        }
        for bad in ["engines..svc", "-a", "a-", "a/b", "", "a b", "_"] {
            assert!(!is_domain(bad), "{bad}");
        }
        assert!(is_value("") && is_value("Qwen3-8B") && is_value("a.b_c") && !is_value("org/model"));
        assert!(!is_value(&"x".repeat(64)) && is_value(&"x".repeat(63)));
        assert!(is_key("kv") && is_key("a.b/c-d") && !is_key("") && !is_key("/a") && !is_key("a/"));
    }
}
