//! The format of the files that AWS's tools share: sections of keys and values.
//!
//! Format: AWS SDKs and Tools Reference Guide, "Format of the config and credentials files". Indented lines belong to
//! the line above them, as those below `s3 =` do, and no key that matters here goes on there.

use std::collections::BTreeMap;

/// Keys, in lower case, and their values.
pub(super) type Section = BTreeMap<String, String>;

/// Which of the two files it is: they name their sections differently.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Flavour {
    /// `[wal]`
    Credentials,
    /// `[profile wal]`, but `[default]`
    Config,
}

/// The profiles in a file, by name. A section that stands there twice is one; of a key that does, the last counts.
pub(super) fn parse(text: &str, flavour: Flavour) -> BTreeMap<String, Section> {
    let mut profiles: BTreeMap<String, Section> = BTreeMap::new();
    let mut current = None;
    for line in text.trim_start_matches('\u{feff}').lines() {
        let is_indented = line.starts_with([' ', '\t']);
        let content = line.trim();
        if content.is_empty() || content.starts_with(['#', ';']) {
            continue;
        }
        if let Some(header) = content.strip_prefix('[') {
            let name = header.split_once(']').and_then(|(name, _)| profile_name(name, flavour));
            current = name.map(|name| profiles.entry(name).or_default());
        } else if let Some(section) = current.as_mut().filter(|_| !is_indented)
            && let Some((key, value)) = content.split_once('=')
        {
            section.insert(key.trim().to_ascii_lowercase(), without_comment(value).to_string());
        }
    }
    profiles
}

fn profile_name(header: &str, flavour: Flavour) -> Option<String> {
    let header = header.trim();
    if flavour == Flavour::Credentials || header == "default" {
        return Some(header.to_string());
    }
    let name = header.strip_prefix("profile").filter(|rest| rest.starts_with([' ', '\t']))?.trim();
    let unquoted = ['"', '\''].into_iter().find_map(|quote| name.strip_prefix(quote)?.strip_suffix(quote));
    Some(unquoted.unwrap_or(name).to_string())
}

/// A value ends before a comment, which begins with white space and `#` or `;`: no key, path or name holds these.
fn without_comment(value: &str) -> &str {
    let starts = value.char_indices().zip(value.chars().skip(1));
    let mut comments = starts.filter(|((_, c), next)| c.is_whitespace() && matches!(next, '#' | ';'));
    let end = comments.next().map_or(value.len(), |((at, _), _)| at);
    value[..end].trim()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sections_keys_and_comments() {
        let text = "\u{feff}stray = 1\n# comment\n[default]\nAWS_Access_Key_ID=AKIA # main\naws_secret_access_key = a=b/#+;c \n\
                    [wal]\r\nregion = x\r\n ; no\r\nnonsense\n[default]\nregion = y\n";
        let profiles = parse(text, Flavour::Credentials);
        let section = |pairs: &[(&str, &str)]| -> Section {
            pairs.iter().map(|(key, value)| (key.to_string(), value.to_string())).collect()
        };
        let default = section(&[("aws_access_key_id", "AKIA"), ("aws_secret_access_key", "a=b/#+;c"), ("region", "y")]);
        let wal = section(&[("region", "x")]);
        assert_eq!(profiles, [("default".to_string(), default), ("wal".to_string(), wal)].into());
    }

    #[test]
    fn an_indented_line_belongs_to_the_one_above() {
        let profiles = parse("[default]\ns3 =\n  region = wrong\nregion = right\n", Flavour::Config);
        assert_eq!(profiles["default"]["region"], "right");
    }

    #[test]
    fn the_config_file_names_profiles_with_a_word() {
        let text =
            "[wal]\na=1\n[profile wal]\na=2\n[ profile \"my wal\" ]\na=3\n[sso-session wal]\na=4\n[profiles]\na=5\n";
        let profiles = parse(text, Flavour::Config);
        let found: Vec<_> = profiles.iter().map(|(name, section)| (name.as_str(), section["a"].as_str())).collect();
        assert_eq!(found, [("my wal", "3"), ("wal", "2")]);
    }
}
