//! Sizes and times, spelled as in postgresql.conf (PostgreSQL manual, "Parameter Names and Values").

use std::time::Duration;

fn parse(text: &str, units: &[(&str, f64)], unit_if_none: f64) -> Option<u64> {
    let split = text.find(|c: char| c.is_ascii_alphabetic()).unwrap_or(text.len());
    let (number, unit) = (text[..split].trim(), text[split..].trim());
    let factor = match unit {
        "" => unit_if_none,
        unit => units.iter().find(|(name, _)| *name == unit)?.1,
    };
    let plain_number = !number.is_empty() && number.bytes().all(|b| b.is_ascii_digit() || b == b'.');
    let value = number.parse::<f64>().ok().filter(|_| plain_number)? * factor;
    (value < u64::MAX as f64).then_some(value.round() as u64)
}

/// A size in bytes; kilobytes where no unit is given. Units are case-sensitive, as PostgreSQL's.
pub fn parse_bytes(text: &str) -> Option<u64> {
    const KB: f64 = 1024.0;
    let units = [("B", 1.0), ("kB", KB), ("MB", KB * KB), ("GB", KB * KB * KB), ("TB", KB * KB * KB * KB)];
    parse(text, &units, KB)
}

/// A time in milliseconds; milliseconds where no unit is given.
pub fn parse_milliseconds(text: &str) -> Option<u64> {
    let units = [("us", 0.001), ("ms", 1.0), ("s", 1e3), ("min", 60e3), ("h", 3_600e3), ("d", 86_400e3)];
    parse(text, &units, 1.0)
}

/// An age as Barman writes it, a whole number and a unit from hours to months of 31 days; minutes and PostgreSQL's short
/// units besides.
pub fn parse_age(text: &str) -> Option<Duration> {
    const MINUTE: u64 = 60;
    const DAY: u64 = 24 * 60 * MINUTE;
    let split = text.find(|c: char| !c.is_ascii_digit())?;
    let (number, unit) = (text[..split].parse::<u64>().ok()?, text[split..].trim().to_ascii_lowercase());
    let seconds = match unit.strip_suffix('s').unwrap_or(&unit) {
        "min" | "minute" => MINUTE,
        "h" | "hour" => 60 * MINUTE,
        "d" | "day" => DAY,
        "week" => 7 * DAY,
        "month" => 31 * DAY,
        _ => return None,
    };
    number.checked_mul(seconds).map(Duration::from_secs)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_and_times_read_as_in_postgresql_conf() {
        assert_eq!(parse_bytes("256MB"), Some(256 << 20));
        assert_eq!(parse_bytes("1.5 GB"), Some(3 << 29));
        assert_eq!(parse_bytes("65536"), Some(64 << 20));
        assert_eq!(parse_milliseconds("60s"), Some(60_000));
        assert_eq!(parse_milliseconds("1 min"), Some(60_000));
        assert_eq!(parse_milliseconds("250"), Some(250));
        assert_eq!(parse_age("90min"), Some(Duration::from_secs(5400)));
        assert_eq!(parse_age("1 MONTH"), Some(Duration::from_secs(31 * 86_400)));
        for wrong in ["", "1", "hour", "1.5 hours", "-1 day", "1 hou", "99999999999999999 weeks"] {
            assert_eq!(parse_age(wrong), None, "{wrong}");
        }
        for wrong in ["", "MB", "1mb", "-1", "1e3", "0x10", "1 2", "inf", "1..2", "NaN"] {
            assert_eq!(parse_bytes(wrong), None, "{wrong}");
        }
    }
}
