//! Canonical CBOR (RFC 8949 §4.2) of a block, as `cbor2.dumps(…, canonical=True)` writes it.

use super::Key;

const UINT: u8 = 0;
const NEGATIVE: u8 = 1;
const BYTES: u8 = 2;
const TEXT: u8 = 3;
const ARRAY: u8 = 4;
const NULL: u8 = 0xf6;

/// `(parent, tokens, extra)`
pub(super) fn block(parent: &[u8], tokens: &[u32], extra: &[Key], out: &mut Vec<u8>) {
    head(ARRAY, 3, out);
    bytes(parent, out);
    head(ARRAY, tokens.len() as u64, out);
    for token in tokens {
        head(UINT, u64::from(*token), out);
    }
    if extra.is_empty() { out.push(NULL) } else { tuple(extra, out) }
}

/// A string.
pub(super) fn text(text: &str, out: &mut Vec<u8>) {
    head(TEXT, text.len() as u64, out);
    out.extend_from_slice(text.as_bytes());
}

fn bytes(bytes: &[u8], out: &mut Vec<u8>) {
    head(BYTES, bytes.len() as u64, out);
    out.extend_from_slice(bytes);
}

fn tuple(items: &[Key], out: &mut Vec<u8>) {
    head(ARRAY, items.len() as u64, out);
    for item in items {
        key(item, out);
    }
}

fn key(key: &Key, out: &mut Vec<u8>) {
    match key {
        Key::None => out.push(NULL),
        // -1 - n is !n in two's complement.
        Key::Int(int) if *int < 0 => head(NEGATIVE, !*int as u64, out),
        Key::Int(int) => head(UINT, *int as u64, out),
        Key::Str(string) => text(string, out),
        Key::Bytes(string) => bytes(string, out),
        Key::Tuple(items) => tuple(items, out),
    }
}

/// Major type and argument in the shortest form.
fn head(major: u8, argument: u64, out: &mut Vec<u8>) {
    let major = major << 5;
    if argument < 24 {
        out.push(major | argument as u8);
    } else if let Ok(short) = u8::try_from(argument) {
        out.extend_from_slice(&[major | 24, short]);
    } else if let Ok(short) = u16::try_from(argument) {
        out.push(major | 25);
        out.extend_from_slice(&short.to_be_bytes());
    } else if let Ok(short) = u32::try_from(argument) {
        out.push(major | 26);
        out.extend_from_slice(&short.to_be_bytes());
    } else {
        out.push(major | 27);
        out.extend_from_slice(&argument.to_be_bytes());
    }
}
