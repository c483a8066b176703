//! `Content-Range` (RFC 9110, 14.4), read strictly: a server that answers a range with another one lies, or is broken.

/// What a partial answer holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ContentRange {
    pub first: u64,
    pub last: u64,
    pub total: u64,
}

/// `bytes 10-99/100`. An unknown total (`*`) is not taken: nothing could be checked by it.
pub fn parse(text: &str) -> Option<ContentRange> {
    let number = |text: &str| {
        let digits = (1..=19).contains(&text.len()) && text.bytes().all(|byte| byte.is_ascii_digit());
        digits.then(|| text.parse::<u64>().ok()).flatten()
    };
    let (range, total) = text.strip_prefix("bytes ")?.split_once('/')?;
    let (first, last) = range.split_once('-')?;
    let range = ContentRange { first: number(first)?, last: number(last)?, total: number(total)? };
    (range.first <= range.last && range.last < range.total).then_some(range)
}

impl ContentRange {
    /// Whether it is all from `have` on, of a body of `size` bytes where that is known.
    pub fn continues(&self, have: u64, size: Option<u64>) -> bool {
        self.first == have && self.last == self.total - 1 && size.is_none_or(|size| size == self.total)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges() {
        let range = parse("bytes 10-99/100").expect("good");
        assert_eq!(range, ContentRange { first: 10, last: 99, total: 100 });
        assert!(range.continues(10, Some(100)) && range.continues(10, None));
        assert!(!range.continues(9, Some(100)) && !range.continues(10, Some(101)));
        assert!(!parse("bytes 10-98/100").expect("good").continues(10, Some(100)));
        for bad in [
            "",
            "bytes",
            "bytes 10-99",
            "bytes */100",
            "bytes 10-99/*",
            "bytes 99-10/100",
            "bytes 10-100/100",
            "bytes -10-99/100",
            "bytes 10-99/99999999999999999999",
            "items 10-99/100",
            "bytes=10-99/100",
            "bytes 10-99/100, 1-2/100",
        ] {
            assert_eq!(parse(bad), None, "{bad}");
        }
    }
}
