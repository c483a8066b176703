# A real distribution: a hundred packages' worth of files imported, hashed, mounted.

case_debian_is_imported_and_runs() {
    RELEASE=debian environment real
    contains "os-release" "$(casemate exec real -- cat /etc/os-release)" "VERSION_CODENAME=$SUITE"
    equal "packages that are broken" "$(casemate exec --root real -- dpkg --audit)" ""
    casemate exec --root real -- dpkg --verify >~/verify
    # Documentation and translations are left out of the archive.
    ! grep -v ' /usr/share/' ~/verify || fail "files differ from the packages'"
    casemate destroy real
}
