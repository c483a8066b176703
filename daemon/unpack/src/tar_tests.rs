use super::*;
use proptest::prelude::*;

struct Bytes<'a>(&'a [u8]);

impl Read for Bytes<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        self.0.read(buffer)
    }
}

impl Skip for Bytes<'_> {
    fn skip(&mut self, bytes: u64) -> std::io::Result<()> {
        let bytes = usize::try_from(bytes).ok().filter(|&n| n <= self.0.len());
        self.0 = &self.0[bytes.ok_or(std::io::ErrorKind::UnexpectedEof)?..];
        Ok(())
    }
}

fn members(bytes: &[u8]) -> Result<Vec<Member>> {
    let mut reader = TarReader::new(Bytes(bytes));
    let mut members = Vec::new();
    while let Some(member) = reader.next_member()? {
        members.push(member);
    }
    reader.finish()?;
    Ok(members)
}

#[test]
fn numbers() {
    for (field, value) in [
        (&b"0000644\0"[..], Some(0o644)),
        (b"   644 \0", Some(0o644)),
        (b"644     ", Some(0o644)),
        (b"00000644", Some(0o644)),
        (b"\0\0\0\0\0\0\0\0", Some(0)),
        (b"        ", Some(0)),
        (b"\x80\0\0\0\0\0\x01\0", Some(256)),
        (b"\xff\xff\xff\xff\xff\xff\xff\xfe", Some(-2)),
        (b"\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xfe", Some(-2)),
        (b"\x80\0\0\0\x7f\xff\xff\xff\xff\xff\xff\xff", Some(i64::MAX)),
        (b"\x80\0\0\0\x80\0\0\0\0\0\0\0", None),
        (b"\x80\0\0\x01\0\0\0\0\0\0\0\0", None),
        (b"\x81\0\0\0\0\0\0\0", None),
        (b"+644\0\0\0\0", None),
        (b"-644\0\0\0\0", None),
        (b"0x644\0\0\0", None),
        (b"648\0\0\0\0\0", None),
        (b"644\x001\0\0\0", None),
        (b"7777777777777777777777777\0", None),
    ] {
        assert_eq!(number(field), value, "{}", field.escape_ascii());
    }
}

#[test]
fn times() {
    for (text, value) in [
        ("0", Some((0, 0))),
        ("1700000000.5", Some((1_700_000_000, 500_000_000))),
        ("1.123456789", Some((1, 123_456_789))),
        ("1.1234567899", Some((1, 123_456_789))),
        ("-1", Some((-1, 0))),
        ("-1.25", Some((-2, 750_000_000))),
        ("-0.5", Some((-1, 500_000_000))),
        ("", None),
        ("1.", None),
        (".5", None),
        ("+1", None),
        ("1e5", None),
        ("--1", None),
        ("99999999999999999999", None),
    ] {
        assert_eq!(time(text.as_bytes()), value, "{text:?}");
    }
}

proptest! {
    #[test]
    fn any_bytes_are_decided(bytes: Vec<u8>) {
        let _ = members(&bytes);
    }

    #[test]
    fn any_pax_is_decided(text in "([0-9]{1,2} [a-zA-Z.]{0,12}=?[ -~]{0,8}\n?){0,4}") {
        let _ = Pax::parse(text.as_bytes());
    }

    /// Headers with a right checksum and anything else at all.
    #[test]
    fn any_header_is_decided(
        mut block in proptest::collection::vec(any::<u8>(), 512),
        kind in proptest::sample::select(b"01234567xgLKSD\0".to_vec()),
        magic in 0usize..3,
        rest in proptest::collection::vec(any::<u8>(), 0..2048),
        plain in any::<bool>(),
    ) {
        if plain {
            block[100..148].fill(b'0');
            block[329..345].fill(0);
        }
        block[156] = kind;
        match magic {
            0 => block[257..265].copy_from_slice(b"ustar\x0000"),
            1 => block[257..265].copy_from_slice(b"ustar  \0"),
            _ => block[257..].fill(0),
        }
        block[148..156].fill(b' ');
        let sum: u32 = block.iter().map(|&b| u32::from(b)).sum();
        block[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
        block.extend(rest);
        let _ = members(&block);
    }
}
