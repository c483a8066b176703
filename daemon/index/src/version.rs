//! Debian's order of versions (Debian Policy 5.6.12).

use std::cmp::Ordering;

fn weight(byte: Option<u8>) -> i32 {
    match byte {
        Some(b'~') => -1,
        None => 0,
        Some(byte) if byte.is_ascii_digit() => 0,
        Some(byte) if byte.is_ascii_alphabetic() => i32::from(byte),
        Some(byte) => i32::from(byte) + 256,
    }
}

fn part(a: &str, b: &str) -> Ordering {
    let (mut a, mut b) = (a.as_bytes(), b.as_bytes());
    while !a.is_empty() || !b.is_empty() {
        loop {
            let letter = |text: &[u8]| text.first().is_some_and(|byte| !byte.is_ascii_digit());
            if !letter(a) && !letter(b) {
                break;
            }
            let order = weight(a.first().copied()).cmp(&weight(b.first().copied()));
            if order != Ordering::Equal {
                return order;
            }
            a = a.get(1..).unwrap_or_default();
            b = b.get(1..).unwrap_or_default();
        }
        let digits = |text: &[u8]| text.iter().take_while(|byte| byte.is_ascii_digit()).count();
        let (x, y) = (digits(a), digits(b));
        let strip =
            |text: &[u8]| -> Vec<u8> { text.iter().copied().skip_while(|byte| *byte == b'0').collect() };
        let (left, right) = (strip(&a[..x]), strip(&b[..y]));
        let order = left.len().cmp(&right.len()).then_with(|| left.cmp(&right));
        if order != Ordering::Equal {
            return order;
        }
        a = &a[x..];
        b = &b[y..];
    }
    Ordering::Equal
}

fn split(version: &str) -> (u64, &str, &str) {
    let (epoch, rest) = version.split_once(':').unwrap_or(("0", version));
    let (upstream, revision) = rest.rsplit_once('-').unwrap_or((rest, "0"));
    (epoch.parse().unwrap_or(0), upstream, revision)
}

pub fn compare(a: &str, b: &str) -> Ordering {
    let (a, b) = (split(a), split(b));
    a.0.cmp(&b.0).then_with(|| part(a.1, b.1)).then_with(|| part(a.2, b.2))
}

/// Whether `version` satisfies `relation wanted`.
pub fn satisfies(version: &str, relation: &str, wanted: &str) -> bool {
    let order = compare(version, wanted);
    match relation {
        "<<" => order.is_lt(),
        "<=" => order.is_le(),
        "=" => order.is_eq(),
        ">=" => order.is_ge(),
        ">>" => order.is_gt(),
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_order_of_policy() {
        let ordered = [
            "~~",
            "~~a",
            "~",
            "",
            "1.0~rc1",
            "1.0",
            "1.0-1",
            "1.0-1+b1",
            "1.0+dfsg-1",
            "1.2",
            "1.10",
            "1.10a",
            "a",
            "1:0.1",
        ];
        for (i, a) in ordered.iter().enumerate() {
            for (j, b) in ordered.iter().enumerate() {
                assert_eq!(compare(a, b), i.cmp(&j), "{a:?} and {b:?}");
            }
        }
        assert_eq!(compare("1.00", "1.0"), Ordering::Equal);
        assert_eq!(compare("0:1-0", "1"), Ordering::Equal);
        assert!(satisfies("2.36-9+deb12u1", ">=", "2.36"));
        assert!(!satisfies("2.36", ">>", "2.36"));
    }
}
