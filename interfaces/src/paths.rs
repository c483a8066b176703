//! Object paths. Text in them is escaped as systemd escapes bus labels: what is not a letter or digit becomes `_xx`.

use zbus::OwnedObjectPath;

use crate::ROOT;

fn escape(text: &str) -> String {
    if text.is_empty() {
        return "_".to_owned();
    }
    let label = |(index, byte): (usize, u8)| match byte {
        b'0'..=b'9' if index == 0 => format!("_{byte:02x}"),
        b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' => char::from(byte).to_string(),
        _ => format!("_{byte:02x}"),
    };
    text.bytes().enumerate().map(label).collect()
}

fn path(kind: &str, label: &str) -> OwnedObjectPath {
    match OwnedObjectPath::try_from(format!("{ROOT}/{kind}/{label}")) {
        Ok(path) => path,
        Err(error) => unreachable!("an escaped label is one: {error}"),
    }
}

pub fn release_path(reference: &str) -> OwnedObjectPath {
    path("release", &escape(reference))
}

/// `id` is hexadecimal.
pub fn environment_path(id: &str) -> OwnedObjectPath {
    path("environment", &escape(id))
}

/// `environment` is an id, hexadecimal.
pub fn snapshot_path(environment: &str, name: &str) -> OwnedObjectPath {
    path("snapshot", &format!("{}_{}", escape(environment), escape(name)))
}

pub fn job_path(id: u64) -> OwnedObjectPath {
    path("job", &id.to_string())
}

pub fn process_path(environment: &str, session: u64) -> OwnedObjectPath {
    path("process", &format!("{}_{session}", escape(environment)))
}

#[cfg(test)]
mod tests {
    #[test]
    fn no_two_texts_share_a_path() {
        assert_eq!(
            super::release_path("debian/bookworm").as_str(),
            "/org/casemate/Casemate1/release/debian_2fbookworm"
        );
        assert_ne!(super::release_path("a_b"), super::release_path("a/b"));
        assert_ne!(super::release_path("1"), super::release_path("_31"));
    }
}
