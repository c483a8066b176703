//! A clear-signed `InRelease`: who signed it, whether it is fresh, and what it vouches for.

use casemate_worker::protocol::{Compression, Failure, FailureKind, IndexFile, ReleaseIndex};
use pgp::composed::{CleartextSignedMessage, Deserializable, SignedPublicKey};
use pgp::crypto::hash::HashAlgorithm;
use pgp::packet::{Signature, SignatureType};
use pgp::types::{KeyDetails, Tag, VerifyingKey};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// Clocks differ; more than this is no difference of clocks.
const TOLERANCE: u64 = 24 * 3600;

pub struct Signed {
    pub text: String,
    pub signer: String,
}

fn refused(kind: FailureKind, message: impl Into<String>) -> Failure {
    Failure::new(kind, "InRelease", message)
}

fn seconds(time: SystemTime) -> u64 {
    time.duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs())
}

fn strong(signature: &Signature) -> bool {
    matches!(
        signature.hash_alg(),
        Some(
            HashAlgorithm::Sha256
                | HashAlgorithm::Sha384
                | HashAlgorithm::Sha512
                | HashAlgorithm::Sha3_256
                | HashAlgorithm::Sha3_512
        )
    )
}

/// Whether a signature by `key`, made `created`, counts: valid, strong, made in the key's life and not in the future.
fn counts(signature: &Signature, key: &impl VerifyingKey, text: &[u8], now: u64) -> bool {
    let Some(created) = signature.created() else { return false };
    let created = seconds(created.into());
    let expired = signature.signature_expiration_time().is_some_and(|life| {
        let life: Duration = life.into();
        !life.is_zero() && created.saturating_add(life.as_secs()) < now
    });
    strong(signature) && created <= now + TOLERANCE && !expired && signature.verify(key, text).is_ok()
}

/// Whether a key was of age by its own binding signatures.
fn alive<'a>(made: u64, bindings: impl Iterator<Item = &'a Signature>, now: u64) -> bool {
    // The newest binding decides, since its expiry replaces that of older ones.
    let newest = bindings.max_by_key(|binding| binding.created().map(|created| seconds(created.into())));
    let Some(newest) = newest else { return false };
    let life: Option<Duration> = newest.key_expiration_time().map(Into::into);
    life.is_none_or(|life| life.is_zero() || made.saturating_add(life.as_secs()) >= now)
}

/// What a certificate's primary key says of itself, where it verifies. What others say of it is neither needed nor
/// verifiable here: Debian's keys certify each other.
fn own_bindings(certificate: &SignedPublicKey) -> Vec<&Signature> {
    let primary = &certificate.primary_key;
    let revokes = |signature: &&Signature| signature.typ() == Some(SignatureType::CertRevocation);
    let of_users = certificate.details.users.iter().flat_map(|user| {
        let own = user
            .signatures
            .iter()
            .filter(|signature| signature.verify_certification(primary, Tag::UserId, &user.id).is_ok());
        let own: Vec<&Signature> = own.collect();
        if own.iter().any(revokes) { Vec::new() } else { own }
    });
    // One that only appoints a revoker, as trixie's security key has, says nothing of the key's life and must not hide what
    // an older binding says of it.
    let direct = certificate.details.direct_signatures.iter().filter(|signature| {
        signature.key_expiration_time().is_some() && signature.verify_key(primary).is_ok()
    });
    of_users.chain(direct).collect()
}

/// Whether a certificate's primary key is one to trust: bound by itself, not revoked, of age.
fn holds(certificate: &SignedPublicKey, now: u64) -> bool {
    let made = seconds(certificate.primary_key.created_at().into());
    certificate.details.revocation_signatures.is_empty()
        && alive(made, own_bindings(certificate).into_iter(), now)
}

fn by_certificate(
    certificate: &SignedPublicKey,
    message: &CleartextSignedMessage,
    text: &[u8],
    now: u64,
) -> Option<String> {
    let primary = &certificate.primary_key;
    if !holds(certificate, now) {
        return None;
    }
    for signature in message.signatures() {
        if counts(signature, primary, text, now) {
            return Some(format!("{:X}", primary.fingerprint()));
        }
        for subkey in &certificate.public_subkeys {
            let revoked = subkey.signatures.iter().any(|s| s.typ() == Some(SignatureType::SubkeyRevocation));
            let signs = subkey.signatures.iter().any(|binding| binding.key_flags().sign());
            if !revoked
                && signs
                && subkey.verify_bindings(primary).is_ok()
                && alive(seconds(subkey.key.created_at().into()), subkey.signatures.iter(), now)
                && counts(signature, &subkey.key, text, now)
            {
                return Some(format!("{:X}", subkey.key.fingerprint()));
            }
        }
    }
    None
}

/// Check the signature; what comes back is the signed text alone.
pub fn verify(bytes: &[u8], keyring: &[String], now: u64) -> Result<Signed, Failure> {
    let broken =
        |message: &str| refused(FailureKind::Verification, format!("it is no clear-signed text: {message}"));
    let text = std::str::from_utf8(bytes).map_err(|_| broken("not UTF-8"))?;
    const BEGIN: &str = "-----BEGIN PGP SIGNED MESSAGE-----\n";
    const END: &str = "-----END PGP SIGNATURE-----\n";
    // Text before or after is signed by nobody, yet shown to whoever reads the file.
    if !text.starts_with(BEGIN) || !text.ends_with(END) {
        return Err(broken("something stands before or after it"));
    }
    if text.matches("-----BEGIN PGP SIGNED MESSAGE-----").count() != 1
        || text.matches(END).count() != 1
        || text.contains('\0')
    {
        return Err(broken("more than one message, or NUL bytes"));
    }
    let (message, _) =
        CleartextSignedMessage::from_string(text).map_err(|error| broken(&error.to_string()))?;
    let signed = message.signed_text();
    for armoured in keyring {
        let (certificate, _) = SignedPublicKey::from_string(armoured).map_err(|error| {
            Failure::new(FailureKind::Request, "keyring", format!("a key cannot be read: {error}"))
        })?;
        if let Some(signer) = by_certificate(&certificate, &message, signed.as_bytes(), now) {
            return Ok(Signed { text: signed.replace("\r\n", "\n"), signer });
        }
    }
    let issuers: Vec<String> = message
        .signatures()
        .iter()
        .flat_map(|s| s.issuer_fingerprint().into_iter().map(|f| format!("{f:X}")))
        .collect();
    Err(refused(
        FailureKind::Verification,
        format!(
            "no valid signature by a key of this source (signed by {}); it was altered, or the keyring is too old",
            issuers.join(", ")
        ),
    ))
}

pub struct Wanted<'a> {
    pub now: u64,
    pub newest_seen: Option<u64>,
    pub suite: &'a str,
    pub component: &'a str,
    pub architecture: &'a str,
}

fn field<'a>(text: &'a str, name: &str) -> Option<&'a str> {
    text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':').map(str::trim))
}

/// Debian writes `Sat, 06 Sep 2025 10:13:15 UTC`; HTTP's form differs in the zone's name alone.
fn date(text: &str, name: &str) -> Result<Option<u64>, Failure> {
    let Some(value) = field(text, name) else { return Ok(None) };
    let value = value.replace("UTC", "GMT").replace("+0000", "GMT");
    // apt also takes days without a leading zero.
    let padded = match value.split_once(", ") {
        Some((day, rest)) if rest.as_bytes().get(1) == Some(&b' ') => format!("{day}, 0{rest}"),
        _ => value,
    };
    let time = httpdate::parse_http_date(&padded)
        .map_err(|_| refused(FailureKind::Refused, format!("{name} is no date: {padded:?}")))?;
    Ok(Some(seconds(time)))
}

/// Judge the signed text.
pub fn judge(text: &str, wanted: &Wanted<'_>) -> Result<ReleaseIndex, Failure> {
    let own = |name: &str| field(text, name).unwrap_or_default().to_owned();
    let (suite, codename) = (own("Suite"), own("Codename"));
    if wanted.suite != suite && wanted.suite != codename {
        let message = format!("it is the index of {codename:?} ({suite:?}), not of {:?}", wanted.suite);
        return Err(refused(FailureKind::Verification, message));
    }
    let made = date(text, "Date")?.ok_or_else(|| refused(FailureKind::Refused, "it has no Date"))?;
    let valid_until = date(text, "Valid-Until")?;
    if made > wanted.now + TOLERANCE {
        return Err(refused(FailureKind::Stale, "its Date is in the future; check this machine's clock"));
    }
    if let Some(newest) = wanted.newest_seen.filter(|newest| made < *newest) {
        return Err(refused(
            FailureKind::Stale,
            format!(
                "it is of {made}, but one of {newest} (seconds since 1970) was seen before; the mirror is behind, or replays an old index"
            ),
        ));
    }
    if valid_until.is_some_and(|until| until < wanted.now) {
        return Err(refused(
            FailureKind::Stale,
            "its Valid-Until has passed; the mirror is behind, or this machine's clock is wrong",
        ));
    }
    for (name, value) in [("Components", wanted.component), ("Architectures", wanted.architecture)] {
        if !own(name).split_whitespace().any(|one| one == value || one.rsplit('/').next() == Some(value)) {
            return Err(refused(FailureKind::NotFound, format!("{name} does not list {value:?}")));
        }
    }
    let base = format!("{}/binary-{}/Packages", wanted.component, wanted.architecture);
    let candidates = [(".xz", Compression::Xz), (".gz", Compression::Gzip), ("", Compression::None)];
    let packages = candidates
        .iter()
        .find_map(|(ending, compression)| listed(text, &format!("{base}{ending}"), *compression))
        .ok_or_else(|| refused(FailureKind::NotFound, format!("SHA256 lists no {base}.xz or .gz")))?;
    Ok(ReleaseIndex {
        origin: own("Origin"),
        suite,
        codename,
        version: own("Version"),
        date: made,
        valid_until,
        signer: String::new(),
        sha256: String::new(),
        packages,
        acquire_by_hash: own("Acquire-By-Hash") == "yes",
    })
}

/// The entry of a file in the `SHA256` section.
fn listed(text: &str, path: &str, compression: Compression) -> Option<IndexFile> {
    let section =
        text.lines().skip_while(|line| *line != "SHA256:").skip(1).take_while(|line| line.starts_with(' '));
    section
        .filter_map(|line| {
            let mut words = line.split_whitespace();
            let (sha256, size, name) = (words.next()?, words.next()?, words.next()?);
            let hex = sha256.len() == 64
                && sha256.bytes().all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b));
            (name == path && hex && words.next().is_none()).then(|| {
                Some(IndexFile {
                    path: path.to_owned(),
                    size: size.parse().ok()?,
                    sha256: sha256.to_owned(),
                    compression,
                })
            })?
        })
        .next()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn text() -> String {
        let hash = "ab".repeat(32);
        format!(
            "Origin: Debian\nSuite: oldstable\nCodename: bookworm\nVersion: 12.12\nDate: Sat,  6 Sep 2025 10:13:15 UTC\nAcquire-By-Hash: yes\n\
             Architectures: all amd64 arm64\nComponents: main contrib\nMD5Sum:\n 00 1 main/binary-amd64/Packages.xz\nSHA256:\n \
             {hash} 12 main/binary-amd64/Packages.gz\n {hash}     34 main/binary-amd64/Packages.xz\n"
        )
        .replace(",  6", ", 06")
    }

    fn wanted() -> Wanted<'static> {
        Wanted {
            now: 1_757_200_000,
            newest_seen: None,
            suite: "bookworm",
            component: "main",
            architecture: "amd64",
        }
    }

    #[test]
    fn a_good_one() {
        let index = judge(&text(), &wanted()).expect("good");
        assert_eq!((index.packages.size, index.packages.compression), (34, Compression::Xz));
        assert_eq!(index.date, 1_757_153_595);
        assert!(index.acquire_by_hash);
    }

    #[test]
    fn stale_foreign_and_incomplete_ones() {
        let kind = |text: &str, wanted: &Wanted<'_>| judge(text, wanted).expect_err("refused").kind;
        assert_eq!(
            kind(&text(), &Wanted { newest_seen: Some(1_757_153_596), ..wanted() }),
            FailureKind::Stale
        );
        assert_eq!(kind(&text(), &Wanted { now: 1_700_000_000, ..wanted() }), FailureKind::Stale);
        assert_eq!(kind(&text(), &Wanted { suite: "trixie", ..wanted() }), FailureKind::Verification);
        assert_eq!(kind(&text(), &Wanted { architecture: "riscv64", ..wanted() }), FailureKind::NotFound);
        let expired = text().replace("Acquire", "Valid-Until: Sat, 06 Sep 2025 11:00:00 UTC\nAcquire");
        assert_eq!(kind(&expired, &wanted()), FailureKind::Stale);
        assert_eq!(kind(&text().replace("Date: Sat", "Date: Xat"), &wanted()), FailureKind::Refused);
        assert_eq!(kind(&text().replace("Packages.", "Other."), &wanted()), FailureKind::NotFound);
    }

    /// Also those that other keys have certified, which all but one have.
    #[test]
    fn the_keys_that_are_shipped_hold_for_as_long_as_they_say() {
        let keys = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../../keys/debian");
        for entry in std::fs::read_dir(keys).expect("keys") {
            let path = entry.expect("entry").path();
            let text = std::fs::read_to_string(&path).expect("key");
            let (certificate, _) = SignedPublicKey::from_string(&text).expect("a certificate");
            assert!(holds(&certificate, 1_757_200_000), "{}", path.display());
            assert!(!holds(&certificate, 2_200_000_000), "{} never expires", path.display());
            let mut unbound = certificate.clone();
            unbound.details.users.clear();
            unbound.details.direct_signatures.clear();
            assert!(!holds(&unbound, 1_757_200_000), "{}", path.display());
        }
    }

    #[test]
    fn what_is_not_one_signed_message_is_refused() {
        let text = "-----BEGIN PGP SIGNED MESSAGE-----\nHash: SHA256\n\nx\n-----BEGIN PGP SIGNATURE-----\n\n=aaaa\n-----END PGP SIGNATURE-----\n";
        for bad in [
            text.to_owned(),
            format!("Origin: x\n{text}"),
            format!("{text}Origin: x\n"),
            format!("{text}{text}"),
            String::new(),
        ] {
            let failure = verify(bad.as_bytes(), &[], 0).err().expect("refused");
            assert_eq!(failure.kind, FailureKind::Verification, "{bad}");
        }
    }
}
