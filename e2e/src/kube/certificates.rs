//! Keys and certificates of a control plane, in the files that its flags name.

use std::net::{IpAddr, Ipv4Addr};
use std::path::Path;

use anyhow::{Context, Result};
use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, IsCa, KeyPair, KeyUsagePurpose, SanType};

/// The authority that has signed the API server's certificate, in PEM.
pub(super) const AUTHORITY: &str = "ca.crt";
/// The API server's certificate, for `127.0.0.1`.
pub(super) const SERVER_CERTIFICATE: &str = "server.crt";
/// The key of [`SERVER_CERTIFICATE`].
pub(super) const SERVER_KEY: &str = "server.key";
/// Signs the tokens of service accounts.
pub(super) const ACCOUNTS_KEY: &str = "accounts.key";
/// Checks the tokens of service accounts.
pub(super) const ACCOUNTS_PUBLIC_KEY: &str = "accounts.pub";

/// Writes all of them into `dir`, and returns the authority's certificate.
pub(super) fn write(dir: &Path) -> Result<String> {
    let mut authority = CertificateParams::new([])?;
    authority.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    authority.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::DigitalSignature];
    let authority = CertifiedIssuer::self_signed(authority, KeyPair::generate()?)?;
    let mut server = CertificateParams::new(["localhost".to_owned(), "kubernetes.default.svc".to_owned()])?;
    server.subject_alt_names.push(SanType::IpAddress(IpAddr::V4(Ipv4Addr::LOCALHOST)));
    let server_key = KeyPair::generate()?;
    let server = server.signed_by(&server_key, &authority)?;
    let accounts = KeyPair::generate()?;
    for (name, contents) in [
        (AUTHORITY, authority.pem()),
        (SERVER_CERTIFICATE, server.pem()),
        (SERVER_KEY, server_key.serialize_pem()),
        (ACCOUNTS_KEY, accounts.serialize_pem()),
        (ACCOUNTS_PUBLIC_KEY, accounts.public_key_pem()),
    ] {
        std::fs::write(dir.join(name), contents).with_context(|| format!("cannot write {name}"))?;
    }
    Ok(authority.pem())
}
