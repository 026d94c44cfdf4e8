//! Access rights of what is created.

/// Rights to read and write a file, from which those of its directory follow.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mode {
    file: u32,
}

impl Mode {
    /// Owner only.
    pub const PRIVATE: Mode = Mode { file: 0o600 };

    /// Files get `file`, directories the same with `x` where there is `r`. The owner must be able to read and write.
    pub fn new(file: u32) -> Option<Self> {
        (file & !0o666 == 0 && file & 0o600 == 0o600).then_some(Mode { file })
    }

    /// For a file.
    pub fn file(self) -> u32 {
        self.file
    }

    /// For a directory.
    pub fn directory(self) -> u32 {
        self.file | (self.file & 0o444) >> 2
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn modes_give_directories_x_where_there_is_r() {
        assert_eq!(Mode::new(0o640).unwrap().directory(), 0o750);
        assert_eq!(Mode::PRIVATE.directory(), 0o700);
        assert_eq!(Mode::new(0o664).unwrap().directory(), 0o775);
        for wrong in [0o777, 0o400, 0o4600, 0o044] {
            assert_eq!(Mode::new(wrong), None, "{wrong:o}");
        }
    }
}
