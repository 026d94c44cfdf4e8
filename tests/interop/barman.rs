//! Barman with its home in a site's storage directory: its server `main` is our `server_name`.

use archiver_core::codec::Compression;
use archiver_core::wal::WalName;
use archiver_tests::Site;
use archiver_tests::gpg::Gpg;
use std::fs;
use std::path::PathBuf;
use std::process::{Child, Command, Output, Stdio};

/// Prints each line of a catalogue as Barman's own reader understands it.
const READ_CATALOGUE: &str = "
import sys
import barman.output
from barman.infofile import WalFileInfo
for line in open(sys.argv[1]):
    wal = WalFileInfo.from_xlogdb_line(line)
    print(wal.name, wal.size, wal.time, wal.compression, wal.encryption)
";

/// A configured Barman.
pub struct Barman {
    folder: PathBuf,
    home: PathBuf,
    key_ring: Option<PathBuf>,
}

/// One of Barman's programs.
pub fn program(name: &str) -> Command {
    let Some(bindir) = std::env::var_os("ARCHIVER_TEST_BARMAN") else {
        panic!("ARCHIVER_TEST_BARMAN is not set: run these tests with `make test-interop`")
    };
    Command::new(PathBuf::from(bindir).join(name))
}

/// What a program wrote that must have succeeded.
#[track_caller]
pub fn succeeded(output: Output) -> Vec<u8> {
    let said = [&output.stdout[..], &output.stderr[..]].map(String::from_utf8_lossy).concat();
    assert!(output.status.success(), "{said}");
    output.stdout
}

impl Barman {
    /// Barman over the site's storage, storing plain.
    pub fn of(site: &Site) -> Self {
        let barman = Barman { folder: site.path("barman"), home: site.storage(), key_ring: None };
        fs::create_dir_all(&barman.folder).expect("create directory");
        fs::create_dir_all(barman.home.join("main/incoming")).expect("create directory");
        barman.configure("");
        barman
    }

    /// The same, storing in that format.
    pub fn with_compression(self, compression: Compression) -> Self {
        if compression != Compression::None {
            self.configure(&format!("compression = {}\ncompression_level = low\n", compression.name()));
        }
        self
    }

    /// The same, storing gzip encrypted to that key, which it reads by that passphrase.
    pub fn with_encryption(mut self, gpg: &Gpg, who: &str, passphrase: &str) -> Self {
        self.key_ring = Some(gpg.home().to_path_buf());
        // Barman takes no encryption of WAL alone.
        self.configure(&format!(
            "compression = gzip\nbackup_compression = gzip\nbackup_compression_format = tar\nencryption = gpg\n\
             encryption_key_id = {who}\nencryption_passphrase_command = echo {passphrase}\n"
        ));
        self
    }

    /// The same with these lines in its server's section.
    pub fn with_lines(self, lines: &str) -> Self {
        self.configure(lines);
        self
    }

    fn configure(&self, more: &str) {
        let user = nix::unistd::User::from_uid(nix::unistd::Uid::effective()).ok().flatten().expect("the OS user").name;
        let (home, folder) = (self.home.display(), self.folder.display());
        let text = format!(
            "[barman]\nbarman_home = {home}\nbarman_user = {user}\nlog_file = {folder}/log\n\
             configuration_files_directory = {folder}\n\
             [main]\ndescription = main\nconninfo = host={folder}\nbackup_method = postgres\narchiver = on\n{more}"
        );
        fs::write(self.folder.join("barman.conf"), text).expect("write barman.conf");
    }

    /// The directory from which it archives.
    pub fn incoming(&self) -> PathBuf {
        self.home.join("main/incoming")
    }

    fn command(&self, arguments: &[&str]) -> Command {
        let mut command = program("barman");
        command.arg("-c").arg(self.folder.join("barman.conf")).args(arguments).current_dir(&self.folder);
        command.envs(self.key_ring.iter().map(|home| ("GNUPGHOME", home)));
        command
    }

    /// Runs a command of Barman's; answers what it wrote.
    #[track_caller]
    pub fn run(&self, arguments: &[&str]) -> Vec<u8> {
        succeeded(self.command(arguments).output().expect("run barman"))
    }

    /// What `barman get-wal` makes of an archived file.
    #[track_caller]
    pub fn get_wal(&self, name: &WalName) -> Vec<u8> {
        self.run(&["get-wal", "main", &name.to_string()])
    }

    /// Lets Barman archive these files from its incoming directory.
    #[track_caller]
    pub fn archive(&self, files: &[(WalName, Vec<u8>)]) {
        let archiving = self.begin_to_archive(files);
        succeeded(archiving.wait_with_output().expect("wait for barman"));
    }

    /// The same, and does not wait.
    pub fn begin_to_archive(&self, files: &[(WalName, Vec<u8>)]) -> Child {
        for (name, content) in files {
            fs::write(self.incoming().join(name.to_string()), content).expect("write WAL file");
        }
        let mut command = self.command(&["archive-wal", "main"]);
        command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("run barman")
    }

    /// The catalogue as Barman reads it: name, size, time, compression and encryption of each file.
    #[track_caller]
    pub fn read_catalogue(&self) -> Vec<String> {
        let catalogue = self.home.join("main/wals/main-xlog.db");
        let output = program("python").args(["-c", READ_CATALOGUE]).arg(catalogue).output().expect("run python");
        String::from_utf8(succeeded(output)).expect("UTF-8").lines().map(str::to_string).collect()
    }
}
