//! An archive's signing key, made for a test.

use std::fs;
use std::path::Path;

use pgp::composed::{ArmorOptions, CleartextSignedMessage, KeyType, SecretKeyParamsBuilder, SignedSecretKey};
use pgp::types::Password;

pub struct Signer(SignedSecretKey);

impl Signer {
    pub fn new() -> Self {
        let mut parameters = SecretKeyParamsBuilder::default();
        parameters
            .key_type(KeyType::Ed25519Legacy)
            .can_certify(true)
            .can_sign(true)
            .primary_user_id("Tests <tests@casemate.example>".into());
        let key = parameters.build().expect("parameters").generate(rand::thread_rng());
        Self(key.expect("a key"))
    }

    /// A directory of keys, for [`crate::World::know_only_by`].
    pub fn publish(&self, directory: &Path) {
        fs::create_dir_all(directory).expect("directory");
        let key = self.0.to_public_key().to_armored_string(ArmorOptions::default());
        fs::write(directory.join("tests.asc"), key.expect("armour")).expect("key");
    }

    /// A clear-signed text of somebody else's, changed and signed by us instead.
    pub fn sign_instead(&self, signed: &[u8], change: impl FnOnce(String) -> String) -> Vec<u8> {
        let signed = std::str::from_utf8(signed).expect("UTF-8");
        let (message, _) = CleartextSignedMessage::from_string(signed).expect("a signed message");
        let text = change(message.signed_text().replace("\r\n", "\n"));
        let ours = CleartextSignedMessage::sign(rand::thread_rng(), &text, &*self.0, &Password::empty());
        let ours = ours.and_then(|message| message.to_armored_string(ArmorOptions::default()));
        ours.expect("a signature").into_bytes()
    }
}

impl Default for Signer {
    fn default() -> Self {
        Self::new()
    }
}
