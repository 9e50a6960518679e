//! JSON as Python's `json.dumps` writes it, for the filter `tojson`: with spaces after the separators, floats as `repr`
//! has them, and only those escapes that JSON needs.

use std::fmt::Write as _;

use minijinja::value::{Kwargs, ValueKind};
use minijinja::{Error, ErrorKind, Value};

/// How `json.dumps` is asked to write.
struct Style {
    indent: Option<String>,
    item_separator: String,
    key_separator: String,
    ensure_ascii: bool,
    sort_keys: bool,
}

/// The filter `tojson` of transformers 5.19 (`utils/chat_template_utils.py`): `json.dumps` without escapes for HTML.
pub(super) fn tojson(value: &Value, ensure_ascii: Option<bool>, kwargs: &Kwargs) -> Result<String, Error> {
    let style = Style::from_kwargs(ensure_ascii, kwargs)?;
    kwargs.assert_all_used()?;
    let mut out = String::new();
    write_value(&mut out, value, &style, 0)?;
    Ok(out)
}

impl Style {
    fn from_kwargs(ensure_ascii: Option<bool>, kwargs: &Kwargs) -> Result<Self, Error> {
        let named: Option<bool> = kwargs.get("ensure_ascii")?;
        let sort_keys: Option<bool> = kwargs.get("sort_keys")?;
        let indent = match kwargs.get::<Option<Value>>("indent")? {
            None => None,
            Some(indent) if indent.is_none() => None,
            Some(indent) => Some(match (indent.as_str(), usize::try_from(indent.clone())) {
                (Some(text), _) => text.to_owned(),
                (None, Ok(width)) if indent.kind() == ValueKind::Number && width <= 64 => " ".repeat(width),
                _ => return Err(not_json("the indent")),
            }),
        };
        let (item_separator, key_separator) = match kwargs.get::<Option<Value>>("separators")? {
            Some(pair) if !pair.is_none() => separators(&pair)?,
            _ if indent.is_some() => (",".to_owned(), ": ".to_owned()),
            _ => (", ".to_owned(), ": ".to_owned()),
        };
        Ok(Self {
            indent,
            item_separator,
            key_separator,
            ensure_ascii: named.or(ensure_ascii).unwrap_or(false),
            sort_keys: sort_keys.unwrap_or(false),
        })
    }
}

fn separators(pair: &Value) -> Result<(String, String), Error> {
    let texts: Vec<Value> = pair.try_iter()?.collect();
    match texts.as_slice() {
        [item, key] => match (item.as_str(), key.as_str()) {
            (Some(item), Some(key)) => Ok((item.to_owned(), key.to_owned())),
            _ => Err(not_json("the separators")),
        },
        _ => Err(not_json("the separators")),
    }
}

pub(super) fn not_json(what: &str) -> Error {
    Error::new(ErrorKind::InvalidOperation, format!("tojson cannot write {what}"))
}

fn write_value(out: &mut String, value: &Value, style: &Style, depth: usize) -> Result<(), Error> {
    match value.kind() {
        ValueKind::None => out.push_str("null"),
        ValueKind::Bool => out.push_str(if value.is_true() { "true" } else { "false" }),
        ValueKind::Number if value.is_integer() => {
            let _ = write!(out, "{value}");
        }
        ValueKind::Number => write_float(out, f64::try_from(value.clone())?),
        ValueKind::String => write_text(out, value.as_str().unwrap_or_default(), style.ensure_ascii),
        ValueKind::Seq => write_list(out, value, style, depth)?,
        ValueKind::Map => write_object(out, value, style, depth)?,
        _ => return Err(not_json("a value that is no JSON")),
    }
    Ok(())
}

fn write_list(out: &mut String, list: &Value, style: &Style, depth: usize) -> Result<(), Error> {
    out.push('[');
    let mut is_empty = true;
    for item in list.try_iter()? {
        next_item(out, style, depth + 1, is_empty);
        write_value(out, &item, style, depth + 1)?;
        is_empty = false;
    }
    end(out, style, depth, is_empty, ']');
    Ok(())
}

fn write_object(out: &mut String, object: &Value, style: &Style, depth: usize) -> Result<(), Error> {
    let mut keys: Vec<Value> = object.try_iter()?.collect();
    if keys.iter().any(|key| key.as_str().is_none()) {
        return Err(not_json("a key that is no text"));
    }
    if style.sort_keys {
        keys.sort_by(|a, b| a.as_str().cmp(&b.as_str()));
    }
    out.push('{');
    let mut is_empty = true;
    for key in keys {
        next_item(out, style, depth + 1, is_empty);
        write_text(out, key.as_str().unwrap_or_default(), style.ensure_ascii);
        out.push_str(&style.key_separator);
        write_value(out, &object.get_item(&key)?, style, depth + 1)?;
        is_empty = false;
    }
    end(out, style, depth, is_empty, '}');
    Ok(())
}

fn next_item(out: &mut String, style: &Style, depth: usize, is_first: bool) {
    if !is_first {
        out.push_str(&style.item_separator);
    }
    new_line(out, style, depth);
}

fn end(out: &mut String, style: &Style, depth: usize, is_empty: bool, bracket: char) {
    if !is_empty {
        new_line(out, style, depth);
    }
    out.push(bracket);
}

fn new_line(out: &mut String, style: &Style, depth: usize) {
    if let Some(indent) = &style.indent {
        out.push('\n');
        for _ in 0..depth {
            out.push_str(indent);
        }
    }
}

fn write_text(out: &mut String, text: &str, ensure_ascii: bool) {
    out.push('"');
    for c in text.chars() {
        match c {
            '"' => out.push_str("\\\""),
            '\\' => out.push_str("\\\\"),
            '\n' => out.push_str("\\n"),
            '\r' => out.push_str("\\r"),
            '\t' => out.push_str("\\t"),
            '\u{8}' => out.push_str("\\b"),
            '\u{c}' => out.push_str("\\f"),
            c if c < ' ' || ensure_ascii && !matches!(c, ' '..='~') => {
                for unit in c.encode_utf16(&mut [0; 2]) {
                    let _ = write!(out, "\\u{unit:04x}");
                }
            }
            c => out.push(c),
        }
    }
    out.push('"');
}

/// `float.__repr__` of a finite number.
pub(super) fn float(number: f64) -> String {
    let mut out = String::new();
    write_float(&mut out, number);
    out
}

/// `float.__repr__`: the shortest digits that read back as the same number, with an exponent below 1e-4 and from 1e16
/// on.
fn write_float(out: &mut String, number: f64) {
    if !number.is_finite() {
        let name = if number.is_nan() {
            "NaN"
        } else if number > 0.0 {
            "Infinity"
        } else {
            "-Infinity"
        };
        out.push_str(name);
        return;
    }
    let scientific = format!("{number:e}");
    let (digits, exponent) = scientific.split_once('e').unwrap_or((&scientific, "0"));
    let exponent: i32 = exponent.parse().unwrap_or(0);
    if number == 0.0 || (-4..16).contains(&exponent) {
        let plain = format!("{number}");
        out.push_str(&plain);
        if !plain.contains('.') {
            out.push_str(".0");
        }
    } else {
        let sign = if exponent < 0 { '-' } else { '+' };
        let _ = write!(out, "{digits}e{sign}{:02}", exponent.abs());
    }
}

#[cfg(test)]
mod tests {
    use super::super::json::{Json, read};
    use super::*;

    fn dumps(json: &str) -> String {
        let value = read(json).expect("JSON").into_value();
        tojson(&value, None, &Kwargs::from_iter(Vec::<(String, Value)>::new())).expect("written")
    }

    #[test]
    fn values_are_written_as_python_writes_them() {
        for (json, python) in [
            (r#"{"b":1,"a":[1,2.0,true,null,"x"],"c":{}}"#, r#"{"b": 1, "a": [1, 2.0, true, null, "x"], "c": {}}"#),
            (r#"{"a":1,"b":2,"a":3}"#, r#"{"a": 3, "b": 2}"#),
            (r#"["<&>'é\u0007\u007f\n/"]"#, "[\"<&>'é\\u0007\u{7f}\\n/\"]"),
            (
                "[1e-5,0.0001,123456.789,1e15,-0.0,-0,0.1,1E2,1.5e-7]",
                "[1e-05, 0.0001, 123456.789, 1000000000000000.0, -0.0, 0, 0.1, 100.0, 1.5e-07]",
            ),
            (r#"{"a":{"b":[1e22,1.5E+300,1e16]},"a2":-0e0}"#, r#"{"a": {"b": [1e+22, 1.5e+300, 1e+16]}, "a2": -0.0}"#),
            ("[18446744073709551615,-9223372036854775808]", "[18446744073709551615, -9223372036854775808]"),
        ] {
            assert_eq!(dumps(json), python);
        }
    }

    #[test]
    fn numbers_beyond_64_bits_are_not_written() {
        for json in ["18446744073709551616", "[1e309]", "{\"a\":-9223372036854775809}"] {
            let Ok(value) = read(json).map(Json::into_value) else { continue };
            assert!(tojson(&value, None, &Kwargs::from_iter(Vec::<(String, Value)>::new())).is_err(), "{json}");
        }
    }
}
