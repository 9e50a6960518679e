//! Pickle protocol 5 of a block, byte for byte as CPython's C pickler writes it.
//!
//! `80 05`, then the body in frames (`95`, length as u64 little-endian). Strings, bytes and tuples are memoized (`94`);
//! a string that occurs again is written as a reference to its memo index. A frame ends before the first value that
//! starts 64 KiB or more into it, so a block of up to 13,000 tokens has one frame; a string of 64 KiB or more stands
//! between two frames (CPython 3.12, `Modules/_pickle.c`, `_Pickler_OpcodeBoundary` and `_Pickler_write_bytes`).

use std::sync::Arc;

use super::Key;

const PROTO_5: [u8; 2] = [0x80, 5];
/// `FRAME`, then the length of the frame.
const FRAME_HEADER: [u8; 9] = [0x95, 0, 0, 0, 0, 0, 0, 0, 0];
const FRAME_TARGET: usize = 64 * 1024;
const MIN_FRAME_LEN: usize = 4;
const STOP: u8 = b'.';
const MEMOIZE: u8 = 0x94;
const BINGET: u8 = b'h';
const LONG_BINGET: u8 = b'j';
const NONE: u8 = b'N';
const BININT1: u8 = b'K';
const BININT2: u8 = b'M';
const BININT: u8 = b'J';
const LONG1: u8 = 0x8a;
const SHORT_BINBYTES: u8 = b'C';
const BINBYTES: u8 = b'B';
const SHORT_BINUNICODE: u8 = 0x8c;
const BINUNICODE: u8 = b'X';
const EMPTY_TUPLE: u8 = b')';
const MARK: u8 = b'(';
const TUPLE: u8 = b't';
/// `TUPLE1`, `TUPLE2` and `TUPLE3` follow each other.
const TUPLE_OF_0: u8 = 0x84;

/// `(parent, tokens, extra)`
pub(super) fn block(parent: &[u8], tokens: &[u32], extra: &[Key], out: &mut Vec<u8>) {
    framed(out, |pickler| {
        pickler.bytes(parent);
        pickler.tokens(tokens);
        if extra.is_empty() {
            pickler.none();
        } else {
            pickler.tuple(extra);
        }
        pickler.close_tuple(3);
    });
}

/// A string alone.
pub(super) fn seed(seed: &str, out: &mut Vec<u8>) {
    framed(out, |pickler| pickler.text(&seed.into()));
}

fn framed(out: &mut Vec<u8>, body: impl FnOnce(&mut Pickler<'_>)) {
    out.extend_from_slice(&PROTO_5);
    let mut pickler = Pickler { frame_start: 0, out, n_memoized: 0, strings: Vec::new() };
    pickler.open_frame();
    body(&mut pickler);
    pickler.out.push(STOP);
    pickler.close_frame();
}

struct Pickler<'a> {
    out: &'a mut Vec<u8>,
    /// Where the open frame's header lies.
    frame_start: usize,
    n_memoized: u32,
    /// Strings that were written, with their memo indexes: few, so a list, and none in a plain block.
    strings: Vec<(Arc<str>, u32)>,
}

impl Pickler<'_> {
    fn open_frame(&mut self) {
        self.frame_start = self.out.len();
        self.out.extend_from_slice(&FRAME_HEADER);
    }

    /// Fills in the frame's length, or takes the header back if it is not worth having.
    fn close_frame(&mut self) {
        let body = self.frame_start + FRAME_HEADER.len();
        let len = self.out.len() - body;
        if len < MIN_FRAME_LEN {
            self.out.drain(self.frame_start..body);
        } else {
            self.out[self.frame_start + 1..body].copy_from_slice(&(len as u64).to_le_bytes());
        }
    }

    /// To be called before each value.
    fn cut_frame_if_long(&mut self) {
        if self.out.len() - self.frame_start >= FRAME_HEADER.len() + FRAME_TARGET {
            self.close_frame();
            self.open_frame();
        }
    }

    fn memoize(&mut self) {
        self.out.push(MEMOIZE);
        self.n_memoized += 1;
    }

    fn bytes(&mut self, bytes: &[u8]) {
        self.cut_frame_if_long();
        self.short_or_long(bytes, SHORT_BINBYTES, BINBYTES);
        self.memoize();
    }

    fn text(&mut self, text: &Arc<str>) {
        self.cut_frame_if_long();
        if let Some((_, memo_idx)) = self.strings.iter().find(|(seen, _)| seen == text) {
            let memo_idx = *memo_idx;
            match u8::try_from(memo_idx) {
                Ok(short) => self.out.extend_from_slice(&[BINGET, short]),
                Err(_) => self.with_u32(LONG_BINGET, memo_idx),
            }
            return;
        }
        self.strings.push((text.clone(), self.n_memoized));
        self.short_or_long(text.as_bytes(), SHORT_BINUNICODE, BINUNICODE);
        self.memoize();
    }

    fn short_or_long(&mut self, bytes: &[u8], short: u8, long: u8) {
        let is_unframed = bytes.len() >= FRAME_TARGET;
        if is_unframed {
            self.close_frame();
        }
        match u8::try_from(bytes.len()) {
            Ok(len) => self.out.extend_from_slice(&[short, len]),
            Err(_) => self.with_u32(long, bytes.len() as u32),
        }
        self.out.extend_from_slice(bytes);
        if is_unframed {
            self.open_frame();
        }
    }

    fn with_u32(&mut self, opcode: u8, argument: u32) {
        self.out.push(opcode);
        self.out.extend_from_slice(&argument.to_le_bytes());
    }

    fn tokens(&mut self, tokens: &[u32]) {
        self.open_tuple(tokens.len());
        for token in tokens {
            self.int(i64::from(*token));
        }
        self.close_tuple(tokens.len());
    }

    fn tuple(&mut self, items: &[Key]) {
        self.open_tuple(items.len());
        for item in items {
            self.key(item);
        }
        self.close_tuple(items.len());
    }

    fn key(&mut self, key: &Key) {
        match key {
            Key::None => self.none(),
            Key::Int(int) => self.int(*int),
            Key::Str(text) => self.text(text),
            Key::Bytes(bytes) => self.bytes(bytes),
            Key::Tuple(items) => self.tuple(items),
        }
    }

    fn open_tuple(&mut self, n_items: usize) {
        self.cut_frame_if_long();
        if n_items > 3 {
            self.out.push(MARK);
        }
    }

    /// The empty tuple is one object for all of Python and is not memoized.
    fn close_tuple(&mut self, n_items: usize) {
        match n_items {
            0 => return self.out.push(EMPTY_TUPLE),
            1..=3 => self.out.push(TUPLE_OF_0 + n_items as u8),
            _ => self.out.push(TUPLE),
        }
        self.memoize();
    }

    fn none(&mut self) {
        self.cut_frame_if_long();
        self.out.push(NONE);
    }

    fn int(&mut self, int: i64) {
        self.cut_frame_if_long();
        if let Ok(int) = u8::try_from(int) {
            self.out.extend_from_slice(&[BININT1, int]);
        } else if let Ok(int) = u16::try_from(int) {
            self.out.push(BININT2);
            self.out.extend_from_slice(&int.to_le_bytes());
        } else if let Ok(int) = i32::try_from(int) {
            self.out.push(BININT);
            self.out.extend_from_slice(&int.to_le_bytes());
        } else {
            self.long(int);
        }
    }

    /// Little-endian two's complement in `bit_length / 8 + 1` bytes, less a last one that only repeats the sign.
    fn long(&mut self, int: i64) {
        let bytes = int.to_le_bytes();
        let bits = 64 - int.unsigned_abs().leading_zeros();
        let mut len = (bits / 8 + 1) as usize;
        let mut wide = [if int < 0 { 0xff } else { 0 }; 9];
        wide[..8].copy_from_slice(&bytes);
        if len > 1 && int < 0 && wide[len - 1] == 0xff && wide[len - 2] & 0x80 != 0 {
            len -= 1;
        }
        self.out.extend_from_slice(&[LONG1, len as u8]);
        self.out.extend_from_slice(&wide[..len]);
    }
}

#[cfg(test)]
mod tests {
    use sha2::Digest as _;

    use super::*;

    /// SHA-256 of the serialized block.
    fn digest(tokens: &[u32], extra: &[Key]) -> String {
        let parent: [u8; 32] = std::array::from_fn(|byte_idx| byte_idx as u8);
        let mut bytes = Vec::new();
        block(&parent, tokens, extra, &mut bytes);
        hex::encode(sha2::Sha256::digest(&bytes))
    }

    /// `sha256(pickle.dumps((bytes(range(32)), tuple([token] * n_tokens), None), 5))` of CPython 3.11.7.
    #[test]
    fn integers_and_frames_are_those_of_cpython() {
        for (n_tokens, token, expected) in [
            (1, u32::MAX, "2ffe70065f5da72db1c4fc09a01509e65196d325a38e1c6edae661bd945a58a2"),
            (2, 1 << 31, "81c856d829ec27ab56d45a57f54aeda5da227c682c36a05826611ccb1b772776"),
            (3, 255, "5a87b8e9b80c1b45f3e99dac4e9c7330f1f4bdee11dd611e4c7dc4fd65295859"),
            (4, 65_536, "a9d315fec9e20e637b237676acc721cc7503fce17207b4012a98cfd97e7bebf4"),
            (13_000, 70_000, "97f6b2b3e4d741b5e0fa8230e6184e1c7f930d3c1591a50fc104a912279bbfbf"),
            (13_105, 70_000, "31225b0240f3499b8eacb64b20cac08cd91075e7d7cce62ebaf27116b5cd4297"),
            (21_830, 300, "af5aaf4910608d3621d202a6332d89edb6b0f20047ca8b1b53ef4638e013dc94"),
            (40_000, 70_000, "638faa3e8578e3876ec356c0f4f5aa12b2bdaf838f15c878a4c80559945a65b6"),
        ] {
            assert_eq!(digest(&vec![token; n_tokens], &[]), expected, "{n_tokens} tokens {token}");
        }
    }

    /// The same with `(("cache_salt", "s"),)`: the frame ends before each of its values in turn.
    #[test]
    fn frame_ends_before_the_value_that_comes_after_64_kib() {
        for (n_tokens, expected) in [
            (13_098, "acb747d2fda8c563b41463931e3be6d0c7584fee7993ba38f2bf921f920fe975"),
            (13_099, "22d29d62061351973c41b26d1d39d1b2c1a713a06d5a416c20a5a53677cc7798"),
            (13_102, "0536fe476fb81d734a73ddd09cef31b774184b57462b4092ea1591519729d4eb"),
            (13_106, "3146fc47395e91507f7a0a18801d5818e0a151ae6d9978a88e5a9f7ae1b09c75"),
            (13_109, "42194d7d3e4df3423152043a8b35546869ac5e206a701454a7e77e335c215a21"),
        ] {
            let salt = Key::cache_salt(&"s".into());
            assert_eq!(digest(&vec![70_000; n_tokens], &[salt]), expected, "{n_tokens} tokens");
        }
    }

    /// The same with tokens `(1, 2)` and `(("cache_salt", "x" * n_bytes),)`.
    #[test]
    fn long_string_stands_between_frames() {
        for (n_bytes, expected) in [
            (65_535, "9f4f7e21431f5de12d78fbfc2b975a77437e546ef24e8e6c3f8bc3237b84cee1"),
            (65_536, "41f3990f9061d67d18137540cbd3208fc2a35dba41f95d4ea709e09de26ef2dc"),
        ] {
            let salt = Key::cache_salt(&"x".repeat(n_bytes).into());
            assert_eq!(digest(&[1, 2], &[salt]), expected, "{n_bytes} bytes");
        }
    }

    /// The same with `("mm", f"image-{i % 300}", -i * 10**10)` for 600 `i`, equal strings being one object.
    #[test]
    fn equal_strings_are_one_object_beyond_256_of_them() {
        let item = |i: i64| Key::mm(&format!("image-{}", i % 300), -i * 10_i64.pow(10));
        let extra: Vec<Key> = (0..600).map(item).collect();
        assert_eq!(digest(&[1, 2], &extra), "b025a056126bbfaecafcd484d0dd1acd6c5407d707f9c8ed29f5209a7d4a5b99");
    }

    #[test]
    fn long_integers_are_as_short_as_cpython_writes_them() {
        for (int, expected) in [
            (-(1_i64 << 31), "4a00000080"),
            (-(1_i64 << 31) - 1, "8a05ffffff7fff"),
            (-(1_i64 << 39), "8a050000000080"),
            (i64::MIN, "8a080000000000000080"),
            (i64::MAX, "8a08ffffffffffffff7f"),
        ] {
            let mut bytes = Vec::new();
            framed(&mut bytes, |pickler| pickler.int(int));
            let body = &hex::encode(&bytes)[22..];
            assert_eq!(body, format!("{expected}2e"), "{int}");
        }
    }
}
