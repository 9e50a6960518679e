//! Filters, tests and methods of text that do what Jinja2 on Python does, or refuse.
//!
//! minijinja's own turn any value into text in its own way (`1e22` is `10000000000000000000000.0`, a list is
//! JSON-like), know other characters as letters and digits, and split lines elsewhere. Values come from clients, so
//! each of these is exact or fails.

use minijinja::value::{Kwargs, Rest, ValueKind};
use minijinja::{Environment, Error, ErrorKind, State, Value};

use super::dumps;

/// The filter that [`super::exact`] puts behind operands of `~`: the operand, if it becomes the text that Python makes
/// of it.
pub(super) const TEXT_GUARD: &str = "text_of_operand";
/// The same behind operands of `+`: text that is marked as safe would escape the other operand in Python.
pub(super) const PLAIN_GUARD: &str = "unmarked_operand";

pub(super) fn refused(what: &'static str) -> Error {
    Error::new(ErrorKind::InvalidOperation, what)
}

/// Puts them in place of minijinja's.
pub(super) fn install(environment: &mut Environment<'static>) {
    environment.set_unknown_method_callback(method);
    environment.add_filter(TEXT_GUARD, |value: &Value| guarded(value));
    environment.add_filter(PLAIN_GUARD, |value: &Value| {
        if value.is_safe() { Err(refused("Python escapes what is added to safe text")) } else { Ok(value.clone()) }
    });
    environment.add_filter("string", |value: &Value| match value.kind() {
        ValueKind::String => Ok(value.clone()),
        _ => text(value).map(Value::from),
    });
    environment.add_filter("trim", |value: &Value, chars: Option<&str>| -> Result<String, Error> {
        let text = plain(value)?;
        Ok(match chars {
            None => text.trim().to_owned(),
            Some(chars) => text.trim_matches(|c| chars.contains(c)).to_owned(),
        })
    });
    environment.add_filter("upper", |value: &Value| ascii(value).map(|text| text.to_ascii_uppercase()));
    environment.add_filter("lower", |value: &Value| ascii(value).map(|text| text.to_ascii_lowercase()));
    environment.add_filter("capitalize", |value: &Value| ascii(value).map(|text| capitalized(&text)));
    environment.add_filter("replace", |value: &Value, old: &Value, new: &Value| -> Result<String, Error> {
        Ok(text(value)?.replace(&text(old)?, &text(new)?))
    });
    environment.add_filter("join", |value: &Value, joiner: Option<&Value>| -> Result<String, Error> {
        join(value, &joiner.map_or(Ok(String::new()), text)?)
    });
    environment.add_filter("dictsort", |value: &Value, rest: Rest<Value>| dictsort(value, &rest));
    for name in ["default", "d"] {
        environment.add_filter(name, |value: &Value, other: Option<Value>, boolean: Option<bool>, named: Kwargs| {
            default(value, other, boolean, &named)
        });
    }
    environment.add_test("iterable", |value: &Value| !value.is_none() && value.try_iter().is_ok());
    environment.add_test("sequence", |value: &Value| match value.kind() {
        ValueKind::Undefined | ValueKind::String | ValueKind::Seq | ValueKind::Map => Ok(true),
        ValueKind::None | ValueKind::Bool | ValueKind::Number => Ok(false),
        // Views and slices are one kind here; in Python a slice is a sequence and a view is none.
        _ => Err(refused("whether this is a sequence is not known")),
    });
}

/// `str(value)`, for values of which minijinja's text and Python's are both known.
pub(super) fn text(value: &Value) -> Result<String, Error> {
    match value.kind() {
        ValueKind::Undefined | ValueKind::None | ValueKind::Bool | ValueKind::String => Ok(value.to_string()),
        ValueKind::Number if value.is_integer() => Ok(value.to_string()),
        ValueKind::Number => match f64::try_from(value.clone()) {
            Ok(number) if number.is_finite() => Ok(dumps::float(number)),
            _ => Err(refused("Python writes this number in another way")),
        },
        _ => Err(refused("Python writes this value in another way")),
    }
}

/// A value that `~` may take as it is, and a float as the text that it becomes.
fn guarded(value: &Value) -> Result<Value, Error> {
    match value.kind() {
        ValueKind::Number if !value.is_integer() => text(value).map(Value::from),
        _ => text(value).map(|_| value.clone()),
    }
}

/// The text of a value that is not marked as safe, a mark that most of Python's methods keep.
fn plain(value: &Value) -> Result<String, Error> {
    if value.is_safe() { Err(refused("safe text is only printed here")) } else { text(value) }
}

/// Letters beyond ASCII are other ones in other versions of Unicode, and their case differs between the languages.
fn ascii(value: &Value) -> Result<String, Error> {
    let text = plain(value)?;
    if text.is_ascii() { Ok(text) } else { Err(refused("letters beyond ASCII are left to the engine")) }
}

fn capitalized(text: &str) -> String {
    let mut lower = text.to_ascii_lowercase();
    if let Some(first) = lower.get_mut(..1) {
        first.make_ascii_uppercase();
    }
    lower
}

/// `str.title`: a letter is small behind a letter, and a capital elsewhere.
fn titled(text: &str) -> String {
    let mut is_inside = false;
    let titled = text.chars().map(|c| {
        let c = if is_inside { c.to_ascii_lowercase() } else { c.to_ascii_uppercase() };
        is_inside = c.is_ascii_alphabetic();
        c
    });
    titled.collect()
}

fn join(values: &Value, joiner: &str) -> Result<String, Error> {
    if values.is_none() {
        return Err(refused("None cannot be joined"));
    }
    let texts: Vec<String> = values.try_iter()?.map(|item| text(&item)).collect::<Result<_, _>>()?;
    Ok(texts.join(joiner))
}

/// By key without regard to case, which is the default; keys are text.
fn dictsort(value: &Value, arguments: &[Value]) -> Result<Value, Error> {
    if value.kind() != ValueKind::Map || !arguments.is_empty() {
        return Err(refused("only objects are sorted, and by their keys"));
    }
    let mut pairs: Vec<(String, Value)> = Vec::new();
    for key in value.try_iter()? {
        let Some(name) = key.as_str() else { return Err(refused("a key is no text")) };
        pairs.push((ascii(&key).map(|_| name.to_owned())?, value.get_item(&key)?));
    }
    pairs.sort_by_key(|(name, _)| name.to_ascii_lowercase());
    Ok(pairs.into_iter().map(|(name, value)| Value::from(vec![Value::from(name), value])).collect())
}

/// `boolean` also by name.
fn default(value: &Value, other: Option<Value>, boolean: Option<bool>, named: &Kwargs) -> Result<Value, Error> {
    let by_name: Option<bool> = named.get("boolean")?;
    let other = match named.get::<Option<Value>>("default_value")? {
        Some(named) => Some(named),
        None => other,
    };
    named.assert_all_used()?;
    let replaces_false = by_name.or(boolean).unwrap_or(false);
    let is_kept = !value.is_undefined() && (!replaces_false || value.is_true());
    Ok(if is_kept { value.clone() } else { other.unwrap_or_else(|| Value::from("")) })
}

/// Methods of Python's types.
fn method(state: &mut State<'_, '_>, value: &Value, method: &str, arguments: &[Value]) -> Result<Value, Error> {
    if value.is_safe() {
        return Err(refused("safe text is only printed here"));
    }
    if let Some(string) = value.as_str() {
        match method {
            "upper" | "lower" | "islower" | "isupper" | "isspace" | "isdigit" | "isnumeric" | "isalnum" | "isalpha" => {
                ascii(value)?;
            }
            "capitalize" if arguments.is_empty() => return ascii(value).map(|text| Value::from(capitalized(&text))),
            "title" if arguments.is_empty() => return ascii(value).map(|text| Value::from(titled(&text))),
            "splitlines" if string.contains(is_odd_line_end) => return Err(refused("Python splits lines elsewhere")),
            "split" if arguments.len() > 1 && arguments[0].is_none() => return Err(refused("how spaces are split")),
            "split" | "count" if arguments.first().and_then(Value::as_str) == Some("") => {
                return Err(refused("an empty text to look for"));
            }
            // What is joined has to be text in Python.
            "join" => {
                let [values] = arguments else { return Err(refused("join takes one list")) };
                let is_text = values.try_iter()?.all(|item| item.as_str().is_some());
                return if is_text {
                    join(values, string).map(Value::from)
                } else {
                    Err(refused("only text is joined"))
                };
            }
            "format" => return Err(refused("formats differ from Python's")),
            _ => {}
        }
    }
    minijinja_contrib::pycompat::unknown_method_callback(state, value, method, arguments)
}

/// Where Python ends a line and Rust does not.
fn is_odd_line_end(c: char) -> bool {
    matches!(c, '\r' | '\u{b}' | '\u{c}' | '\u{1c}'..='\u{1e}' | '\u{85}' | '\u{2028}' | '\u{2029}')
}
