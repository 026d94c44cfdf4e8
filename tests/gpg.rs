//! The real gpg, with keys of its own, in a directory of its own.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use tempfile::TempDir;

/// A key ring. What it started ends with it.
pub struct Gpg {
    home: TempDir,
}

impl Default for Gpg {
    fn default() -> Self {
        Self::new()
    }
}

impl Gpg {
    /// An empty one.
    pub fn new() -> Self {
        // Its agent listens on a socket there: the path must be short.
        let home = tempfile::Builder::new().prefix("gpg").tempdir_in("/tmp").expect("temporary directory");
        Gpg { home }
    }

    /// Where its keys are, for GNUPGHOME.
    pub fn home(&self) -> &Path {
        self.home.path()
    }

    fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new("gpg");
        command.env("GNUPGHOME", self.home()).env("LC_ALL", "C").stdin(Stdio::null());
        command.args(["--batch", "--quiet", "--pinentry-mode", "loopback", "--trust-model", "always"]).args(arguments);
        command
    }

    /// What gpg prints, called so.
    pub fn run(&self, arguments: &[&str]) -> Vec<u8> {
        let Output { status, stdout, stderr } = self.command(arguments).output().expect("run gpg");
        assert!(status.success(), "gpg {arguments:?}: {}", String::from_utf8_lossy(&stderr));
        stdout
    }

    /// A new key: `algorithm` is `default` (RSA) or `future-default` (Curve25519), `expires` as gpg wants it, `never` too.
    pub fn add_key(&self, who: &str, algorithm: &str, passphrase: &str, expires: &str) {
        self.run(&["--passphrase", passphrase, "--quick-gen-key", who, algorithm, "default", expires]);
    }

    /// A file of its public keys.
    pub fn public_keys(&self, who: &[&str], is_armored: bool) -> PathBuf {
        let armor: &[&str] = if is_armored { &["--armor"] } else { &[] };
        self.export("public", &[armor, &["--export"], who].concat())
    }

    /// A file of its secret keys, locked as they are.
    pub fn secret_keys(&self, who: &[&str], passphrase: &str) -> PathBuf {
        self.export("secret", &[&["--armor", "--passphrase", passphrase, "--export-secret-keys"], who].concat())
    }

    fn export(&self, prefix: &str, arguments: &[&str]) -> PathBuf {
        let exported = self.run(arguments);
        assert!(!exported.is_empty(), "nothing was exported");
        let (_, path) =
            tempfile::Builder::new().prefix(prefix).tempfile_in(self.home()).expect("file").keep().expect("keep");
        fs::write(&path, exported).expect("write keys");
        path
    }

    /// Revokes that key.
    pub fn revoke(&self, who: &str) {
        let listing = String::from_utf8(self.run(&["--with-colons", "--list-keys", who])).expect("UTF-8");
        let fingerprint = listing.lines().find_map(|line| line.strip_prefix("fpr:::::::::")).expect("a fingerprint");
        let fingerprint = fingerprint.trim_end_matches(':');
        let certificate = self.home().join(format!("openpgp-revocs.d/{fingerprint}.rev"));
        // A colon keeps it from being used by mistake.
        let text =
            fs::read_to_string(certificate).expect("revocation certificate").replace(":-----BEGIN", "-----BEGIN");
        let armed = self.home().join("revocation");
        fs::write(&armed, text).expect("write");
        self.run(&["--import", armed.to_str().expect("UTF-8")]);
    }

    /// What gpg makes of an encrypted file.
    pub fn decrypt(&self, encrypted: &Path, passphrase: &str) -> Vec<u8> {
        self.run(&["--passphrase", passphrase, "--decrypt", encrypted.to_str().expect("UTF-8")])
    }

    /// A file encrypted by gpg, not compressed by it, as Barman calls it.
    pub fn encrypt(&self, who: &str, plain: &Path, encrypted: &Path) {
        let [plain, encrypted] = [plain, encrypted].map(|path| path.to_str().expect("UTF-8"));
        self.run(&["--yes", "--compress-level", "0", "--recipient", who, "--output", encrypted, "--encrypt", plain]);
    }
}

impl Drop for Gpg {
    fn drop(&mut self) {
        let _ = Command::new("gpgconf").env("GNUPGHOME", self.home()).args(["--kill", "all"]).output();
    }
}
