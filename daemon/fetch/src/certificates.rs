//! Whom to trust: the system's CA certificates, found as OpenSSL finds them (`SSL_CERT_FILE`, `SSL_CERT_DIR`, then the
//! distributions' places).

use std::sync::Arc;

use rustls::pki_types::CertificateDer;
use rustls::{ClientConfig, RootCertStore};

#[derive(Debug, thiserror::Error)]
pub enum CertificatesError {
    #[error(
        "there are no CA certificates to check servers by; install the package ca-certificates, or let SSL_CERT_FILE name a file of them{0}"
    )]
    None(String),
    #[error("TLS cannot be set up: {0}")]
    Tls(#[from] rustls::Error),
}

/// Read the system's certificates. To be called before confinement.
pub fn read() -> Result<Vec<CertificateDer<'static>>, CertificatesError> {
    let found = rustls_native_certs::load_native_certs();
    if found.certs.is_empty() {
        let why =
            found.errors.first().map(|error| format!(" ({})", crate::address::plain(&error.to_string())));
        return Err(CertificatesError::None(why.unwrap_or_default()));
    }
    Ok(found.certs)
}

/// Trust these, as far as they make sense; a system's store often has a few that do not.
pub fn tls(certificates: Vec<CertificateDer<'static>>) -> Result<ClientConfig, CertificatesError> {
    let mut roots = RootCertStore::empty();
    let (added, ignored) = roots.add_parsable_certificates(certificates);
    if added == 0 {
        return Err(CertificatesError::None(format!(" ({ignored} were malformed)")));
    }
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let builder = ClientConfig::builder_with_provider(provider).with_safe_default_protocol_versions()?;
    let mut config = builder.with_root_certificates(roots).with_no_client_auth();
    config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
    Ok(config)
}
